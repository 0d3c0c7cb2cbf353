//! A checker of images, as simple as it can be: counts every reference and
//! compares with the refcounts. Shares only the decoding of entries with the
//! engine it judges.

use std::ops::ControlFlow;

use qcow2_ublk::codec;
use qcow2_ublk::qcow2::spec::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_ublk::qcow2::spec::header::Prefix;
use qcow2_ublk::qcow2::spec::snapshot::{self, Snapshot};
use qcow2_ublk::qcow2::spec::{
    Geometry, Header, HostOffset, L1Entry, L2Entry, RawL2Entry, ReftableEntry, Subcluster, refcount,
};
use qcow2_ublk::storage::sim::Image;

/// An image's bytes, decoded on demand.
pub struct Checked<'a> {
    image: &'a Image,
    /// Where guest data is: the external data file, or the image.
    data: &'a Image,
    pub header: Header,
    geometry: Geometry,
    reftable: Vec<u64>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Clusters with a refcount above the number of references.
    pub leaks: u64,
    /// Those of them that the file reaches to: further ones take no space, and
    /// `qemu-img check` does not look at them.
    pub leaks_in_file: u64,
    /// What can lose data.
    pub corruptions: Vec<String>,
}

fn words(image: &Image, offset: HostOffset, count: u64) -> Vec<u64> {
    image
        .bytes(offset.0, count * 8)
        .chunks_exact(8)
        .map(|word| u64::from_be_bytes(word.try_into().unwrap()))
        .collect()
}

impl<'a> Checked<'a> {
    pub fn open(image: &'a Image) -> Result<Self, String> {
        let prefix = Prefix::parse(&image.bytes(0, 512)).map_err(|e| e.to_string())?;
        let cluster0 = image.bytes(0, prefix.cluster_size() as u64);
        let header = Header::parse(&cluster0, image.len()).map_err(|e| e.to_string())?;
        let geometry = header.geometry();
        let reftable = words(
            image,
            header.refcount_table_offset,
            header.reftable_bytes() / 8,
        );
        Ok(Self {
            image,
            data: image,
            header,
            geometry,
            reftable,
        })
    }

    /// With an external data file.
    pub fn with_data(self, data: Option<&'a Image>) -> Self {
        Self {
            data: data.unwrap_or(self.image),
            ..self
        }
    }

    pub fn snapshots(&self) -> Vec<Snapshot> {
        let mut at = self.header.snapshots_offset;
        let mut snapshots = Vec::new();
        for _ in 0..self.header.nb_snapshots {
            let head = self.image.bytes(at.0, snapshot::HEAD_LEN as u64);
            let len = snapshot::entry_len(&head, at).unwrap();
            let entry = self.image.bytes(at.0, len as u64);
            let (snapshot, len) = Snapshot::parse(&entry, at, &self.geometry).unwrap();
            snapshots.push(snapshot);
            at += len as u64;
        }
        snapshots
    }

    /// The bitmap directory; empty if nobody vouches for it.
    pub fn bitmaps(&self) -> Vec<Bitmap> {
        let Some(extension) = self.header.bitmaps() else {
            return Vec::new();
        };
        if !self.header.bitmaps_consistent() {
            return Vec::new();
        }
        let directory = self
            .image
            .bytes(extension.directory_offset.0, extension.directory_size);
        Bitmap::parse_directory(&directory, extension, &self.geometry).unwrap()
    }

    /// A bitmap's table.
    pub fn bitmap_table(&self, bitmap: &Bitmap) -> Vec<BitmapTableEntry> {
        words(self.image, bitmap.table_offset, bitmap.table_size.into())
            .into_iter()
            .map(|raw| BitmapTableEntry::decode(raw, &self.geometry).unwrap())
            .collect()
    }

    fn count_bitmaps(&self, add: &mut impl FnMut(HostOffset, u64)) {
        let bitmaps = self.bitmaps();
        if let Some(extension) = self.header.bitmaps().filter(|_| !bitmaps.is_empty()) {
            add(extension.directory_offset, extension.directory_size);
        }
        for bitmap in &bitmaps {
            add(bitmap.table_offset, u64::from(bitmap.table_size) * 8);
            for entry in self.bitmap_table(bitmap) {
                if let BitmapTableEntry::Cluster(offset) = entry {
                    add(offset, 1);
                }
            }
        }
    }

    fn l2(&self, entry: L1Entry) -> Vec<RawL2Entry> {
        match entry {
            L1Entry::Unallocated => Vec::new(),
            L1Entry::Table { offset, .. } => {
                let table = self.image.bytes(offset.0, self.geometry.cluster_size());
                RawL2Entry::all(&table, &self.geometry).collect()
            }
        }
    }

    /// Counts every reference and judges every refcount.
    pub fn check(&self) -> Findings {
        let mut found = Findings::default();
        // The clusters that are referred to, each as often as it is.
        let mut references: Vec<u64> = Vec::new();
        let bits = self.geometry.cluster_bits;
        let mut add = |offset: HostOffset, len: u64| {
            if len > 0 {
                references.extend(offset.cluster(bits)..=(offset.0 + len - 1) >> bits);
            }
        };
        let header = &self.header;
        add(HostOffset(0), 1);
        add(header.refcount_table_offset, header.reftable_bytes());
        if let Some((offset, len)) = header.crypto_header() {
            add(offset, len);
        }
        for &raw in &self.reftable {
            match ReftableEntry::decode(raw, &self.geometry) {
                Ok(ReftableEntry::Absent) => {}
                Ok(ReftableEntry::Block(offset)) => add(offset, 1),
                Err(bad) => found.corruptions.push(format!("reftable: {bad}")),
            }
        }
        let snapshots = self.snapshots();
        if let Some(last) = snapshots.last() {
            let mut end = header.snapshots_offset.0;
            for _ in &snapshots {
                let head = self.image.bytes(end, snapshot::HEAD_LEN as u64);
                end += snapshot::entry_len(&head, HostOffset(end)).unwrap() as u64;
            }
            let _ = last;
            add(header.snapshots_offset, end - header.snapshots_offset.0);
        }
        self.count_bitmaps(&mut add);
        let mut copied_flags = Vec::new();
        let active = (header.l1_table_offset, header.l1_size, true);
        let inactive = snapshots
            .iter()
            .map(|s| (s.l1_table_offset, s.l1_size, false));
        for (offset, size, active) in std::iter::once(active).chain(inactive) {
            add(offset, u64::from(size) * 8);
            for raw in words(self.image, offset, size.into()) {
                let entry = match L1Entry::decode(raw, &self.geometry) {
                    Ok(entry) => entry,
                    Err(bad) => {
                        found.corruptions.push(format!("L1: {bad}"));
                        continue;
                    }
                };
                if let L1Entry::Table { offset, copied } = entry {
                    add(offset, 1);
                    if active {
                        copied_flags.push((offset, copied, "L1"));
                    }
                }
                for raw in self.l2(entry) {
                    if raw == RawL2Entry::default() {
                        continue;
                    }
                    match L2Entry::decode(raw, &self.geometry) {
                        Ok(L2Entry::Compressed(range)) => add(range.offset, range.max_len),
                        Ok(entry) => {
                            // In an external data file nothing is counted.
                            let counted = |_: &_| !self.geometry.external_data;
                            if let Some((host, copied)) = entry.host().filter(counted) {
                                add(host, 1);
                                if active {
                                    copied_flags.push((host, copied, "L2"));
                                }
                            }
                        }
                        Err(bad) => found.corruptions.push(format!("L2: {bad}")),
                    }
                }
            }
        }
        references.sort_unstable();
        self.compare(&references, &copied_flags, &mut found);
        found
    }

    fn compare(
        &self,
        references: &[u64],
        copied_flags: &[(HostOffset, bool, &str)],
        found: &mut Findings,
    ) {
        let bits = self.geometry.cluster_bits;
        let per_block = self.geometry.refcounts_per_block();
        // Clusters and their counts, in order, without those of 0.
        let mut counts: Vec<(u64, u64)> = Vec::new();
        for (index, &raw) in self.reftable.iter().enumerate() {
            let Ok(ReftableEntry::Block(offset)) = ReftableEntry::decode(raw, &self.geometry)
            else {
                continue;
            };
            let block = self.image.bytes(offset.0, self.geometry.cluster_size());
            // In words: most of a block is zeros.
            let per_word = per_block * 8 / self.geometry.cluster_size();
            let order = self.geometry.refcount_order;
            for (nth, word) in (0..).zip(block.chunks_exact(8)) {
                if word == [0; 8] {
                    continue;
                }
                for i in nth * per_word..(nth + 1) * per_word {
                    let count = refcount::get(&block, order, i as usize);
                    if count > 0 {
                        counts.push((index as u64 * per_block + i, count));
                    }
                }
            }
        }
        let of = |cluster: u64| {
            let place = counts.binary_search_by_key(&cluster, |&(cluster, _)| cluster);
            place.map_or(0, |place| counts[place].1)
        };
        for same in references.chunk_by(|a, b| a == b) {
            let (cluster, wanted, count) = (same[0], same.len() as u64, of(same[0]));
            if count < wanted {
                found.corruptions.push(format!(
                    "cluster {cluster:#x} has {wanted} references and refcount {count}"
                ));
            }
        }
        let mut rest = references;
        for &(cluster, count) in &counts {
            let before = rest.iter().take_while(|&&other| other < cluster);
            rest = &rest[before.count()..];
            let references = rest.iter().take_while(|&&other| other == cluster).count();
            rest = &rest[references..];
            if count > references as u64 {
                found.leaks += 1;
                found.leaks_in_file += u64::from(cluster << bits < self.image.len());
            }
        }
        for (offset, copied, table) in copied_flags {
            let count = of(offset.cluster(bits));
            if *copied != (count == 1) {
                found.corruptions.push(format!(
                    "{table} entry for {offset}: COPIED is {copied} with refcount {count}"
                ));
            }
        }
    }

    /// Tells `found` what the L1 table at `l1` shows of a disk of `size` bytes,
    /// over a layer that shows `below`: piece by piece, each with its first
    /// byte. Stops when that says so.
    fn shown<'s>(
        &'s self,
        (l1, l1_size): (HostOffset, u32),
        size: u64,
        below: &'s [u8],
        found: &mut dyn FnMut(u64, Piece<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let cluster_size = self.geometry.cluster_size();
        let mut at = 0;
        for raw in words(self.image, l1, l1_size.into()) {
            let entry = L1Entry::decode(raw, &self.geometry).unwrap();
            let mut l2 = self.l2(entry);
            l2.resize(self.geometry.l2_entries() as usize, RawL2Entry::default());
            for raw in l2 {
                let len = cluster_size.min(size - at);
                if len == 0 {
                    return ControlFlow::Continue(());
                }
                let entry = L2Entry::decode(raw, &self.geometry).unwrap();
                self.shown_by(entry, at, len, below, found)?;
                at += len;
            }
        }
        found(at, Piece::Zeros(size - at))
    }

    /// What an L2 entry shows in the `len` bytes from `at` on.
    fn shown_by(
        &self,
        entry: L2Entry,
        at: u64,
        len: u64,
        below: &[u8],
        found: &mut dyn FnMut(u64, Piece<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let cluster_size = self.geometry.cluster_size();
        match entry {
            L2Entry::Unallocated => show_below(at, len, below, found),
            L2Entry::Mixed {
                host, subclusters, ..
            } => {
                let each = cluster_size / 32;
                for index in 0..len.div_ceil(each) as u32 {
                    let start = u64::from(index) * each;
                    let (at, len) = (at + start, each.min(len - start));
                    match (subclusters.get(index), host) {
                        (Subcluster::Unallocated, _) => show_below(at, len, below, found)?,
                        (Subcluster::Data, Some(host)) => {
                            found(at, Piece::Image(self.data, host.0 + start, len))?;
                        }
                        _ => found(at, Piece::Zeros(len))?,
                    }
                }
                ControlFlow::Continue(())
            }
            L2Entry::Zero | L2Entry::ZeroAllocated { .. } => found(at, Piece::Zeros(len)),
            L2Entry::Data { host, .. } => found(at, Piece::Image(self.data, host.0, len)),
            L2Entry::Compressed(range) => {
                let input = self.image.bytes(range.offset.0, range.max_len);
                let mut output = vec![0; cluster_size as usize];
                codec::decompress(self.header.compression_type, &input, &mut output).unwrap();
                found(at, Piece::Bytes(&output[..len as usize]))
            }
        }
    }

    /// What the L1 table at `l1` shows of a disk of `size` bytes, over a layer
    /// that shows `below`.
    pub fn content(&self, l1: HostOffset, l1_size: u32, size: u64, below: &[u8]) -> Vec<u8> {
        let mut disk = vec![0; size as usize];
        let all = self.shown((l1, l1_size), size, below, &mut |at, piece| {
            piece.copy_to(&mut disk[at as usize..]);
            ControlFlow::Continue(())
        });
        debug_assert!(all.is_continue());
        disk
    }

    /// Where the first piece begins in which a disk, as in [`Self::content`],
    /// is not `wanted`.
    fn differs(
        &self,
        l1: (HostOffset, u32),
        size: u64,
        below: &[u8],
        wanted: &[u8],
    ) -> Option<u64> {
        if wanted.len() as u64 != size {
            return Some(size.min(wanted.len() as u64));
        }
        let mut place = None;
        let _ = self.shown(l1, size, below, &mut |at, piece| {
            if piece.is(&wanted[at as usize..]) {
                return ControlFlow::Continue(());
            }
            place = Some(at);
            ControlFlow::Break(())
        });
        place
    }

    /// The content of snapshot number `index`.
    pub fn snapshot_content(&self, index: usize, below: &[u8]) -> Vec<u8> {
        let snapshot = &self.snapshots()[index];
        let (offset, entries) = (snapshot.l1_table_offset, snapshot.l1_size);
        self.content(offset, entries, self.size_of(snapshot), below)
    }

    /// Where a snapshot begins to show something else than `wanted`.
    pub fn snapshot_differs(
        &self,
        snapshot: &Snapshot,
        below: &[u8],
        wanted: &[u8],
    ) -> Option<u64> {
        let l1 = (snapshot.l1_table_offset, snapshot.l1_size);
        self.differs(l1, self.size_of(snapshot), below, wanted)
    }

    fn size_of(&self, snapshot: &Snapshot) -> u64 {
        let size = snapshot.disk_size;
        size.unwrap_or_else(|| self.header.virtual_size())
    }

    /// The content of the active disk.
    pub fn active_content(&self, below: &[u8]) -> Vec<u8> {
        let header = &self.header;
        self.content(
            header.l1_table_offset,
            header.l1_size,
            header.virtual_size(),
            below,
        )
    }

    /// Where the active disk begins to show something else than `wanted`.
    pub fn active_differs(&self, below: &[u8], wanted: &[u8]) -> Option<u64> {
        let header = &self.header;
        let l1 = (header.l1_table_offset, header.l1_size);
        self.differs(l1, header.virtual_size(), below, wanted)
    }
}

/// What a part of a disk is.
enum Piece<'a> {
    Zeros(u64),
    Bytes(&'a [u8]),
    /// So many bytes of an image from this one on.
    Image(&'a Image, u64, u64),
}

impl Piece<'_> {
    fn copy_to(&self, disk: &mut [u8]) {
        match *self {
            Self::Zeros(len) => disk[..len as usize].fill(0),
            Self::Bytes(bytes) => disk[..bytes.len()].copy_from_slice(bytes),
            Self::Image(image, at, len) => image.read(at, &mut disk[..len as usize]),
        }
    }

    /// Whether it is what these begin with.
    fn is(&self, disk: &[u8]) -> bool {
        match *self {
            Self::Zeros(len) => {
                let mut sectors = disk[..len as usize].chunks(512);
                sectors.all(|sector| *sector == [0; 512][..sector.len()])
            }
            Self::Bytes(bytes) => disk[..bytes.len()] == *bytes,
            Self::Image(image, at, len) => {
                let mut pieces = image.pieces(at, len);
                pieces.all(|(at, piece)| disk[at..at + piece.len()] == *piece)
            }
        }
    }
}

/// Tells what is below in the `len` bytes from `at` on: zeros behind its end.
fn show_below(
    at: u64,
    len: u64,
    below: &[u8],
    found: &mut dyn FnMut(u64, Piece<'_>) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let there = (below.len() as u64).clamp(at, at + len) - at;
    if there > 0 {
        found(at, Piece::Bytes(&below[at as usize..(at + there) as usize]))?;
    }
    found(at + there, Piece::Zeros(len - there))
}
