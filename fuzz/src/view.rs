//! What an image shows, told as simply as can be: the mapping is followed
//! entry by entry, with nothing of the engine but the decoding of entries.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use qcow2_ublk::codec;
use qcow2_ublk::qcow2::spec::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_ublk::qcow2::spec::header::{CryptMethod, Prefix};
use qcow2_ublk::qcow2::spec::snapshot::{self, Snapshot};
use qcow2_ublk::qcow2::spec::{
    Geometry, GuestOffset, Header, HostOffset, L1Entry, L2Entry, RawL2Entry, Subcluster,
};
use qcow2_ublk::storage::sim::Image;

/// Most guest clusters that are looked at, and most bytes of them.
pub const MANY: u64 = 600;
const MANY_BYTES: u64 = 8 << 20;

/// An image whose header is right.
pub struct View<'a> {
    image: &'a Image,
    pub header: Header,
    pub geometry: Geometry,
}

/// The header, if it is right.
pub fn header_of(image: &Image) -> Option<Header> {
    let prefix = Prefix::parse(&image.bytes(0, 512.min(image.len()))).ok()?;
    let cluster0 = image.bytes(0, prefix.cluster_size() as u64);
    Header::parse(&cluster0, image.len()).ok()
}

impl<'a> View<'a> {
    /// None without a header, or where other files or keys are needed.
    pub fn open(image: &'a Image) -> Option<Self> {
        let header = header_of(image)?;
        if header.crypt_method != CryptMethod::None || header.has_data_file() {
            return None;
        }
        Some(Self {
            geometry: header.geometry(),
            image,
            header,
        })
    }

    /// From now on it is about a snapshot, whose disk has `size` bytes.
    pub fn shows(&mut self, snapshot: &Snapshot, size: u64) {
        self.header.l1_table_offset = snapshot.l1_table_offset;
        self.header.l1_size = snapshot.l1_size;
        self.header.size = size;
    }

    fn be64(&self, at: HostOffset) -> u64 {
        u64::from_be_bytes(self.image.bytes(at.0, 8).try_into().expect("8 bytes"))
    }

    /// Guest clusters that are looked at, the first ones.
    pub fn clusters(&self) -> u64 {
        self.geometry
            .clusters_for(self.header.virtual_size())
            .min(MANY)
            .min(MANY_BYTES >> self.geometry.cluster_bits)
    }

    /// The L1 entry over a guest cluster.
    fn l1_entry(&self, cluster: u64) -> Option<L1Entry> {
        let guest = GuestOffset(cluster << self.geometry.cluster_bits);
        let index = self.geometry.l1_index(guest);
        if index >= self.header.l1_size.into() {
            return Some(L1Entry::Unallocated); // a snapshot of a smaller disk
        }
        let l1 = self.header.l1_table_offset + index * 8;
        L1Entry::decode(self.be64(l1), &self.geometry).ok()
    }

    /// The entry of a guest cluster; None if that breaks a rule.
    pub fn entry(&self, cluster: u64) -> Option<L2Entry> {
        match self.l1_entry(cluster)? {
            L1Entry::Unallocated => Some(L2Entry::Unallocated),
            L1Entry::Table { offset, .. } => {
                // Behind the end of the file are zeros, as for QEMU.
                let guest = GuestOffset(cluster << self.geometry.cluster_bits);
                let len = self.geometry.l2_entry_bytes();
                let at = offset + self.geometry.l2_index(guest) * len;
                let raw = RawL2Entry::read(&self.image.bytes(at.0, len), &self.geometry);
                L2Entry::decode(raw, &self.geometry).ok()
            }
        }
    }

    /// What a guest cluster shows, up to the end of the disk; None if it cannot
    /// be read.
    pub fn cluster(&self, cluster: u64) -> Option<Vec<u8>> {
        let size = self.geometry.cluster_size();
        let start = cluster << self.geometry.cluster_bits;
        let mut bytes = vec![0; size as usize];
        match self.entry(cluster)? {
            L2Entry::Unallocated | L2Entry::Zero | L2Entry::ZeroAllocated { .. } => {}
            L2Entry::Data { host, .. } => self.image.read(host.0, &mut bytes),
            L2Entry::Mixed {
                host, subclusters, ..
            } => {
                let len = size / 32;
                for index in 0..32 {
                    if let (Subcluster::Data, Some(host)) = (subclusters.get(index), host) {
                        let at = u64::from(index) * len;
                        let part = &mut bytes[at as usize..(at + len) as usize];
                        self.image.read(host.0 + at, part);
                    }
                }
            }
            L2Entry::Compressed(range) => {
                // Where the file ends before it does, it goes on with zeros.
                let input = self.image.bytes(range.offset.0, range.max_len);
                codec::decompress(self.header.compression_type, &input, &mut bytes).ok()?;
            }
        }
        bytes.truncate((self.header.virtual_size() - start).min(size) as usize);
        Some(bytes)
    }

    /// All that is looked at.
    pub fn content(&self) -> Vec<Option<Vec<u8>>> {
        (0..self.clusters()).map(|n| self.cluster(n)).collect()
    }

    /// Guest clusters that are mapped through, or onto, something that has
    /// another use too: a repair may change what they show.
    pub fn entangled(&self) -> Vec<bool> {
        let uses = self.uses();
        let is = |cluster: u64, what: u8| uses.get(&cluster).is_some_and(|u| u & what != 0);
        let bits = self.geometry.cluster_bits;
        let all = self.l1_clusters().any(|cluster| is(cluster, TABLE | DATA));
        (0..self.clusters())
            .map(|n| {
                let under = match self.l1_entry(n) {
                    Some(L1Entry::Table { offset, .. }) => is(offset.cluster(bits), OTHER | DATA),
                    _ => false,
                };
                let mapped = self
                    .entry(n)
                    .and_then(|entry| entry.references(&self.geometry))
                    .is_some_and(|mut range| range.any(|c| is(c, OTHER | TABLE)));
                all || under || mapped
            })
            .collect()
    }

    fn l1_clusters(&self) -> RangeInclusive<u64> {
        let (bits, start) = (self.geometry.cluster_bits, self.header.l1_table_offset);
        let last = start + self.header.l1_bytes().max(1) - HostOffset(1);
        start.cluster(bits)..=last >> bits
    }

    /// What each cluster of the file is used for.
    fn uses(&self) -> BTreeMap<u64, u8> {
        let mut uses = BTreeMap::new();
        let (bits, geometry) = (self.geometry.cluster_bits, &self.geometry);
        let mut add = |offset: HostOffset, len: u64, what: u8| {
            let end = offset.0.saturating_add(len).min(self.image.len() + 1);
            if len > 0 && offset.0 < end {
                for cluster in offset.cluster(bits)..=(end - 1) >> bits {
                    *uses.entry(cluster).or_default() |= what;
                }
            }
        };
        let header = &self.header;
        add(HostOffset(0), 1, OTHER);
        add(header.refcount_table_offset, header.reftable_bytes(), OTHER);
        let words = |at: HostOffset, len: u64| {
            // Not more than there is.
            let len = len.min(self.image.len().saturating_sub(at.0)).min(1 << 20) & !7;
            let bytes = self.image.bytes(at.0, len);
            let words = bytes.chunks_exact(8);
            words
                .map(|word| u64::from_be_bytes(word.try_into().expect("8 bytes")))
                .filter(|&word| word != 0)
                .collect::<Vec<u64>>()
        };
        for word in words(header.refcount_table_offset, header.reftable_bytes()) {
            add(HostOffset(word & OFFSET), 1, OTHER);
        }
        let mut l1s = vec![(header.l1_table_offset, header.l1_bytes())];
        let mut at = header.snapshots_offset;
        for _ in 0..header.nb_snapshots.min(64) {
            let head = self.image.bytes(at.0, snapshot::HEAD_LEN as u64);
            let Ok(len) = snapshot::entry_len(&head, at) else {
                break;
            };
            let entry = self.image.bytes(at.0, len as u64);
            let Ok((snapshot, _)) = Snapshot::parse(&entry, at, geometry) else {
                break;
            };
            add(at, len as u64, OTHER);
            l1s.push((snapshot.l1_table_offset, snapshot.l1_bytes()));
            at += len as u64;
        }
        for (offset, len) in l1s {
            add(offset, len.min(1 << 20), OTHER);
            for word in words(offset, len) {
                let table = HostOffset(word & OFFSET);
                add(table, 1, TABLE);
                if table.0 >= self.image.len() {
                    continue;
                }
                let table = self.image.bytes(table.0, geometry.cluster_size());
                for raw in RawL2Entry::all(&table, geometry) {
                    let range = L2Entry::decode(raw, geometry)
                        .ok()
                        .and_then(|entry| entry.references(geometry));
                    for cluster in range.into_iter().flatten() {
                        add(HostOffset::of_cluster(cluster, bits), 1, DATA);
                    }
                }
            }
        }
        if let Some(bitmaps) = header.bitmaps() {
            let len = bitmaps.directory_size.min(1 << 20);
            add(bitmaps.directory_offset, len, OTHER);
            let directory = self.image.bytes(bitmaps.directory_offset.0, len);
            for bitmap in Bitmap::parse_directory(&directory, bitmaps, geometry).unwrap_or_default()
            {
                let len = u64::from(bitmap.table_size) * 8;
                add(bitmap.table_offset, len.min(1 << 20), OTHER);
                for word in words(bitmap.table_offset, len) {
                    if let Ok(BitmapTableEntry::Cluster(at)) =
                        BitmapTableEntry::decode(word, geometry)
                    {
                        add(at, 1, OTHER);
                    }
                }
            }
        }
        uses
    }
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Metadata other than L2 tables.
const OTHER: u8 = 1;
const TABLE: u8 = 2;
const DATA: u8 = 4;
