//! What can be wrong with an image.

use std::fmt;

use crate::qcow2::spec::addr::HostOffset;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// Data is damaged or will be by further writes.
    Corruption,
    /// Space is lost.
    Leak,
    /// Something could not be checked.
    Error,
}

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The first cluster.
    Header,
    /// An L1 table, the active one or that of a snapshot.
    L1Table,
    /// An L2 table.
    L2Table,
    /// A cluster of guest data.
    Data,
    /// A compressed cluster of guest data.
    Compressed,
    /// The snapshot table.
    SnapshotTable,
    /// The encryption header.
    CryptoHeader,
    /// The list of bitmaps.
    BitmapDirectory,
    /// The table of a bitmap.
    BitmapTable,
    /// A cluster of a bitmap.
    BitmapData,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
}

/// Something wrong, and how many times it counts: tables that several
/// snapshots share count once for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// How often it was found.
    pub times: u64,
    /// What it is.
    pub problem: Problem,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A cluster's refcount is not the number of its uses.
    Refcount {
        /// The cluster's number.
        cluster: u64,
        /// What the image says.
        stored: u64,
        /// How often it is used.
        counted: u64,
    },
    /// A cluster has more uses than a refcount can say.
    Overflow {
        /// The cluster's number.
        cluster: u64,
    },
    /// A cluster has uses that exclude each other, whatever its refcount.
    Overlap {
        /// The cluster's number.
        cluster: u64,
        /// How often it is used.
        counted: u64,
    },
    /// The refcounts of some clusters cannot be read.
    UnreadableRefcounts {
        /// The first of the clusters.
        first: u64,
        /// The refcount block they are in.
        block: u64,
    },
    /// A part lies behind the end of the file.
    OutsideFile {
        /// What it is.
        part: Part,
        /// Its first byte.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A table could not be read.
    UnreadableTable {
        /// What it is.
        part: Part,
        /// Its first byte.
        offset: u64,
        /// Why.
        reason: String,
    },
    /// An entry of a table breaks a rule.
    BadEntry {
        /// The table the entry is in.
        table: Part,
        /// Where the entry is in the file.
        at: HostOffset,
        /// The entry, as a native number.
        entry: u64,
        /// Which rule.
        rule: Rule,
    },
    /// An entry's COPIED flag does not say whether the refcount is 1.
    Copied {
        /// The table the entry is in.
        table: Part,
        /// Where the entry is in the file.
        at: HostOffset,
        /// The entry, as a native number.
        entry: u64,
    },
    /// A snapshot's L1 table cannot be where, or as long as, the entry says.
    BadSnapshotL1 {
        /// The snapshot's index in the table.
        index: usize,
    },
    /// A snapshot table entry lacks what version 3 requires.
    IncompleteSnapshot {
        /// The snapshot's index in the table.
        index: usize,
    },
    /// A snapshot table entry has more extra data than anybody handles.
    ExtraSnapshotData {
        /// The snapshot's index in the table.
        index: usize,
        /// How much.
        bytes: u64,
    },
    /// An image with an external data file has snapshots, which would be
    /// those of its metadata only.
    SnapshotsWithDataFile {
        /// How many.
        count: u32,
    },
    /// The list of bitmaps cannot be understood.
    BadBitmapDirectory {
        /// Why.
        reason: String,
    },
}

/// A rule that an entry of a table breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Reserved bits are zero.
    ReservedBits,
    /// Offsets are multiples of the cluster size.
    Misaligned,
    /// A refcount block is inside the file.
    BlockOutside,
    /// A refcount block is used once, as what it is.
    BlockShared,
    /// A compressed cluster does not have the COPIED flag.
    CopiedCompressed,
    /// Compressed clusters and an external data file exclude each other.
    CompressedExternal,
    /// A compressed cluster has no subclusters.
    CompressedSubclusters,
    /// A subcluster is allocated or zero, not both.
    SubclusterBoth,
    /// A subcluster is allocated only in a cluster that is.
    SubclusterNowhere,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "the header",
            Self::L1Table => "an L1 table",
            Self::L2Table => "an L2 table",
            Self::Data => "a data cluster",
            Self::Compressed => "a compressed cluster",
            Self::SnapshotTable => "the snapshot table",
            Self::CryptoHeader => "the encryption header",
            Self::BitmapDirectory => "the bitmap directory",
            Self::BitmapTable => "a bitmap's table",
            Self::BitmapData => "a bitmap's cluster",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReservedBits => "reserved bits are set",
            Self::Misaligned => "the offset is not a multiple of the cluster size",
            Self::BlockOutside => "the refcount block lies outside the file",
            Self::BlockShared => "the refcount block's cluster has other uses too",
            Self::CopiedCompressed => "a compressed cluster has the COPIED flag",
            Self::CompressedExternal => "a compressed cluster in an image with external data",
            Self::CompressedSubclusters => "a compressed cluster has subclusters",
            Self::SubclusterBoth => "a subcluster is both allocated and zero",
            Self::SubclusterNowhere => "a subcluster is allocated but its cluster is not",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.severity {
            Severity::Leak => "Leaked ",
            Severity::Corruption | Severity::Error => "ERROR ",
        })?;
        write!(f, "{}", self.problem)?;
        if self.times > 1 {
            write!(f, " ({} times)", self.times)?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refcount {
                cluster,
                stored,
                counted,
            } => write!(f, "cluster {cluster} refcount={stored} reference={counted}"),
            Self::Overflow { cluster } => {
                write!(f, "cluster {cluster} has more uses than a refcount can say")
            }
            Self::Overlap { cluster, counted } => write!(
                f,
                "cluster {cluster} has {counted} uses that exclude each other"
            ),
            Self::UnreadableRefcounts { first, block } => write!(
                f,
                "the refcounts of cluster {first} and others cannot be read (block at {block:#x})"
            ),
            Self::OutsideFile { part, offset, len } => write!(
                f,
                "{part} of {len} bytes at {offset:#x} lies behind the end of the file"
            ),
            Self::UnreadableTable {
                part,
                offset,
                reason,
            } => write!(f, "cannot read {part} at {offset:#x}: {reason}"),
            Self::BadEntry {
                table,
                at,
                entry,
                rule,
            } => write!(f, "entry {entry:#x} of {table}, at {at}: {rule}"),
            Self::Copied { table, at, entry } => write!(
                f,
                "OFLAG_COPIED of entry {entry:#x} of {table}, at {at}, contradicts the refcount"
            ),
            Self::BadSnapshotL1 { index } => {
                write!(f, "snapshot {index} has an impossible L1 table")
            }
            Self::IncompleteSnapshot { index } => {
                write!(f, "snapshot {index} lacks its disk size")
            }
            Self::ExtraSnapshotData { index, bytes } => {
                write!(f, "snapshot {index} has too much extra data: {bytes} bytes")
            }
            Self::SnapshotsWithDataFile { count } => {
                write!(
                    f,
                    "{count} snapshots in an image with an external data file"
                )
            }
            Self::BadBitmapDirectory { reason } => write!(f, "the bitmap directory: {reason}"),
        }
    }
}
