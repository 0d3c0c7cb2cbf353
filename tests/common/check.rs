//! A checker of images, as simple as it can be: counts every reference and
//! compares with the refcounts. Shares only the decoding of entries with the
//! engine it judges.

use std::collections::BTreeMap;

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
        let mut references: BTreeMap<u64, u64> = BTreeMap::new();
        let bits = self.geometry.cluster_bits;
        let mut add = |offset: HostOffset, len: u64| {
            if len > 0 {
                for cluster in offset.cluster(bits)..=(offset.0 + len - 1) >> bits {
                    *references.entry(cluster).or_default() += 1;
                }
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
        self.compare(&references, &copied_flags, &mut found);
        found
    }

    fn compare(
        &self,
        references: &BTreeMap<u64, u64>,
        copied_flags: &[(HostOffset, bool, &str)],
        found: &mut Findings,
    ) {
        let bits = self.geometry.cluster_bits;
        let per_block = self.geometry.refcounts_per_block();
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
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
                        counts.insert(index as u64 * per_block + i, count);
                    }
                }
            }
        }
        for (&cluster, &wanted) in references {
            let count = counts.get(&cluster).copied().unwrap_or(0);
            if count < wanted {
                found.corruptions.push(format!(
                    "cluster {cluster:#x} has {wanted} references and refcount {count}"
                ));
            }
        }
        for (cluster, count) in &counts {
            if *count > references.get(cluster).copied().unwrap_or(0) {
                found.leaks += 1;
                found.leaks_in_file += u64::from(cluster << bits < self.image.len());
            }
        }
        for (offset, copied, table) in copied_flags {
            let count = counts.get(&offset.cluster(bits)).copied().unwrap_or(0);
            if *copied != (count == 1) {
                found.corruptions.push(format!(
                    "{table} entry for {offset}: COPIED is {copied} with refcount {count}"
                ));
            }
        }
    }

    /// What the L1 table at `l1` shows of a disk of `size` bytes, over a layer
    /// that shows `below`.
    pub fn content(&self, l1: HostOffset, l1_size: u32, size: u64, below: &[u8]) -> Vec<u8> {
        let cluster_size = self.geometry.cluster_size();
        let mut disk = Vec::with_capacity(size as usize);
        for raw in words(self.image, l1, l1_size.into()) {
            let entry = L1Entry::decode(raw, &self.geometry).unwrap();
            let mut l2 = self.l2(entry);
            l2.resize(self.geometry.l2_entries() as usize, RawL2Entry::default());
            for raw in l2 {
                if disk.len() as u64 >= size {
                    break;
                }
                match L2Entry::decode(raw, &self.geometry).unwrap() {
                    L2Entry::Unallocated => show_below(&mut disk, below, cluster_size),
                    L2Entry::Mixed {
                        host, subclusters, ..
                    } => {
                        let len = cluster_size / 32;
                        for index in 0..32 {
                            match (subclusters.get(index), host) {
                                (Subcluster::Unallocated, _) => {
                                    show_below(&mut disk, below, len);
                                }
                                (Subcluster::Data, Some(host)) => {
                                    let at = host.0 + u64::from(index) * len;
                                    disk.extend(self.data.bytes(at, len));
                                }
                                _ => disk.resize(disk.len() + len as usize, 0),
                            }
                        }
                    }
                    L2Entry::Zero | L2Entry::ZeroAllocated { .. } => {
                        disk.resize(disk.len() + cluster_size as usize, 0);
                    }
                    L2Entry::Data { host, .. } => {
                        disk.extend(self.data.bytes(host.0, cluster_size));
                    }
                    L2Entry::Compressed(range) => {
                        let input = self.image.bytes(range.offset.0, range.max_len);
                        let mut output = vec![0; cluster_size as usize];
                        codec::decompress(self.header.compression_type, &input, &mut output)
                            .unwrap();
                        disk.append(&mut output);
                    }
                }
            }
        }
        disk.resize(size as usize, 0);
        disk
    }

    /// The content of snapshot number `index`.
    pub fn snapshot_content(&self, index: usize, below: &[u8]) -> Vec<u8> {
        let snapshot = &self.snapshots()[index];
        let size = snapshot
            .disk_size
            .unwrap_or_else(|| self.header.virtual_size());
        self.content(snapshot.l1_table_offset, snapshot.l1_size, size, below)
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
}

/// Adds what is below a disk's next `len` bytes.
fn show_below(disk: &mut Vec<u8>, below: &[u8], len: u64) {
    let whole = disk.len() + len as usize;
    let shown = below.len().min(disk.len())..below.len().min(whole);
    disk.extend_from_slice(&below[shown]);
    disk.resize(whole, 0);
}
