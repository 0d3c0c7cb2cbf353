//! Images made by hand, byte for byte: no program would make these.

use std::path::{Path, PathBuf};

use qcow2_ublk::storage::sim;

pub(crate) const COPIED: u64 = 1 << 63;

/// Fields of the header.
pub(crate) const BACKING_OFFSET: u64 = 8;
pub(crate) const BACKING_SIZE: u64 = 16;
pub(crate) const CLUSTER_BITS: u64 = 20;
pub(crate) const SIZE: u64 = 24;
pub(crate) const CRYPT_METHOD: u64 = 32;
pub(crate) const L1_SIZE: u64 = 36;
pub(crate) const L1_OFFSET: u64 = 40;
pub(crate) const REFTABLE_OFFSET: u64 = 48;
pub(crate) const REFTABLE_CLUSTERS: u64 = 56;
pub(crate) const SNAPSHOTS: u64 = 60;
pub(crate) const SNAPSHOTS_OFFSET: u64 = 64;
pub(crate) const INCOMPATIBLE: u64 = 72;
pub(crate) const AUTOCLEAR: u64 = 88;
pub(crate) const REFCOUNT_ORDER: u64 = 96;
pub(crate) const HEADER_LENGTH: u64 = 100;
const EXTENSIONS: u64 = 112;

/// Types of header extensions.
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
pub(crate) const CRYPTO: u32 = 0x0537_be77;
pub(crate) const DATA_FILE: u32 = 0x4441_5441;

/// An image, sound at first: header, refcount table, refcount block, L1 table,
/// L2 table and one data cluster, in this order, one cluster each. The disk is
/// what the L2 table maps, or less; its first cluster is 0x5a.
#[derive(Clone)]
pub(crate) struct Craft {
    pub(crate) file: sim::Image,
    pub(crate) bits: u32,
    extensions_end: u64,
}

impl Craft {
    pub(crate) fn new(bits: u32) -> Self {
        let mut craft = Self {
            file: sim::Image::new(),
            bits,
            extensions_end: EXTENSIONS,
        };
        craft.file.set_len(craft.at(6));
        craft.put32(0, 0x5146_49fb);
        craft.put32(4, 3);
        craft.put32(CLUSTER_BITS, bits);
        craft.put64(SIZE, (1 << (2 * bits - 3)).min(4 << 20));
        craft.put32(L1_SIZE, 1);
        craft.put64(L1_OFFSET, craft.at(3));
        craft.put64(REFTABLE_OFFSET, craft.at(1));
        craft.put32(REFTABLE_CLUSTERS, 1);
        craft.put32(REFCOUNT_ORDER, 4);
        craft.put32(HEADER_LENGTH, EXTENSIONS as u32);
        craft.put64(craft.at(1), craft.at(2));
        for cluster in 0..6 {
            craft.count(cluster, 1);
        }
        craft.put64(craft.at(3), craft.at(4) | COPIED);
        craft.put64(craft.at(4), craft.at(5) | COPIED);
        craft.put(craft.at(5), &vec![0x5a; 1 << bits]);
        craft
    }

    /// Where cluster number `n` is.
    pub(crate) fn at(&self, n: u64) -> u64 {
        n << self.bits
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        self.file.write(at, bytes);
        self
    }

    pub(crate) fn put16(&mut self, at: u64, value: u16) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    pub(crate) fn put32(&mut self, at: u64, value: u32) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    pub(crate) fn put64(&mut self, at: u64, value: u64) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    /// Gives the cluster a refcount.
    pub(crate) fn count(&mut self, cluster: u64, count: u16) -> &mut Self {
        self.put16(self.at(2) + cluster * 2, count)
    }

    /// Adds a header extension.
    pub(crate) fn extension(&mut self, kind: u32, data: &[u8]) -> &mut Self {
        let at = self.extensions_end;
        self.put32(at, kind).put32(at + 4, data.len() as u32);
        self.put(at + 8, data);
        self.extensions_end = at + 8 + (data.len() as u64).next_multiple_of(8);
        self
    }

    /// Names a backing file, and its format if there is one.
    pub(crate) fn backing(&mut self, name: &[u8], format: &str) -> &mut Self {
        if !format.is_empty() {
            self.extension(BACKING_FORMAT, format.as_bytes());
        }
        let at = self.extensions_end + 8;
        self.put64(BACKING_OFFSET, at);
        self.put32(BACKING_SIZE, name.len() as u32).put(at, name)
    }

    /// An entry of the bitmaps extension, and the bit that goes with it.
    pub(crate) fn bitmaps(&mut self, count: u32, len: u64, at: u64) -> &mut Self {
        let mut data = count.to_be_bytes().to_vec();
        data.extend([0; 4]);
        data.extend(len.to_be_bytes());
        data.extend(at.to_be_bytes());
        self.extension(BITMAPS, &data).put64(AUTOCLEAR, 1)
    }

    /// A snapshot's entry in a table; its length.
    pub(crate) fn snapshot(
        &mut self,
        at: u64,
        l1: u64,
        entries: u32,
        id: &[u8],
        name: &[u8],
    ) -> u64 {
        self.put64(at, l1).put32(at + 8, entries);
        self.put16(at + 12, id.len() as u16);
        self.put16(at + 14, name.len() as u16);
        self.put32(at + 36, 16).put64(at + 48, 1 << 20);
        self.put(at + 56, id).put(at + 56 + id.len() as u64, name);
        let len = (56 + id.len() + name.len()).next_multiple_of(8) as u64;
        // The padding is there.
        let end = self.file.len().max(at + len);
        self.file.set_len(end);
        len
    }

    pub(crate) fn save(&self, path: &Path) -> PathBuf {
        self.file.save(path).unwrap();
        path.to_owned()
    }
}
