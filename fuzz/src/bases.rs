//! The images that recipes start from: made by several versions of QEMU, see
//! `fuzz/make-bases`. New ones go to the end: kept inputs name them by number.

/// Name and recipe of each base.
pub const BASES: &[(&str, &[u8])] = &[
    ("v2-512", include_bytes!("../bases/v2-512")),
    ("v2-snap", include_bytes!("../bases/v2-snap")),
    ("v2-packed", include_bytes!("../bases/v2-packed")),
    ("rc1", include_bytes!("../bases/rc1")),
    ("rc2-snap", include_bytes!("../bases/rc2-snap")),
    ("rc4", include_bytes!("../bases/rc4")),
    ("rc8", include_bytes!("../bases/rc8")),
    ("rc32", include_bytes!("../bases/rc32")),
    ("rc64-snap", include_bytes!("../bases/rc64-snap")),
    ("bitmaps", include_bytes!("../bases/bitmaps")),
    ("snap-bitmaps", include_bytes!("../bases/snap-bitmaps")),
    ("bitmaps-11", include_bytes!("../bases/bitmaps-11")),
    ("deflate", include_bytes!("../bases/deflate")),
    ("deflate-512", include_bytes!("../bases/deflate-512")),
    ("zstd", include_bytes!("../bases/zstd")),
    ("zstd-snap", include_bytes!("../bases/zstd-snap")),
    ("subclusters", include_bytes!("../bases/subclusters")),
    ("sub-snap", include_bytes!("../bases/sub-snap")),
    ("lazy", include_bytes!("../bases/lazy")),
    ("prealloc", include_bytes!("../bases/prealloc")),
    ("64k-5.2", include_bytes!("../bases/64k-5.2")),
    ("64k-11.1", include_bytes!("../bases/64k-11.1")),
    ("256k", include_bytes!("../bases/256k")),
];
