//! Options refused, and layouts that account for every cluster.

use proptest::prelude::*;

use super::*;

#[test]
fn options_are_refused_in_the_words_of_qemu_img() {
    let refused = |change: fn(&mut CreateOptions), expected: &str| {
        let mut options = CreateOptions::new(1 << 20);
        change(&mut options);
        let error = options.build().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(
            error.to_string().contains(expected),
            "{error}, not {expected}"
        );
    };
    for size in [0, 1, 256, 1000, 4 << 20, u64::MAX] {
        let options = CreateOptions {
            cluster_size: size,
            ..CreateOptions::new(1)
        };
        assert!(
            options
                .build()
                .unwrap_err()
                .to_string()
                .starts_with("Cluster size must be")
        );
    }
    for bits in [0, 3, 128, 1 << 32, u64::MAX] {
        let options = CreateOptions {
            refcount_bits: bits,
            ..CreateOptions::new(1)
        };
        assert!(
            options
                .build()
                .unwrap_err()
                .to_string()
                .starts_with("Refcount width must")
        );
    }
    refused(|o| o.version = 1, "'version' does not accept value '1'");
    refused(
        |o| (o.version, o.refcount_bits) = (2, 8),
        "Different refcount widths than 16 bits require compatibility level 1.1",
    );
    refused(
        |o| (o.version, o.lazy_refcounts) = (2, true),
        "Lazy refcounts only supported",
    );
    refused(
        |o| (o.version, o.compression_type) = (2, CompressionType::Zstd),
        "Non-zlib compression type is only supported",
    );
    refused(
        |o| o.size = 1 << 63,
        "Must be between 0 and 9223372036854775807",
    );
    refused(
        |o| o.size = i64::MAX as u64,
        "too large for file format 'qcow2'",
    );
    refused(
        |o| o.size = (2 << 50) + 1,
        "too large for file format 'qcow2'",
    );
    refused(
        |o| (o.size, o.cluster_size) = ((128 << 30) + 1, 512),
        "too large for file format 'qcow2'",
    );
    let backing = |file: &str, format: Option<&str>| CreateOptions {
        backing: Some(Backing {
            file: file.into(),
            format: format.map(Into::into),
        }),
        ..CreateOptions::new(1)
    };
    let message = |options: CreateOptions| options.build().unwrap_err().to_string();
    assert!(message(backing("", Some("raw"))).contains("got empty string"));
    assert!(message(backing("a", None)).contains("without backing format"));
    assert!(message(backing("a", Some(""))).contains("backing-fmt"));
    assert!(message(backing("a", Some("sixteen bytes ok"))).contains("backing-fmt"));
    assert!(message(backing(&"x".repeat(1024), Some("raw"))).contains("at most 1023"));
    assert!(message(backing("a\0", Some("raw"))).contains("NUL"));
    let small = CreateOptions {
        cluster_size: 512,
        ..backing(&"x".repeat(400), Some("raw"))
    };
    assert!(message(small).contains("more than a cluster of 512"));
    assert_eq!(parse_compat("0.10").unwrap(), 2);
    assert_eq!(parse_compat("v3").unwrap(), 3);
    assert!(
        parse_compat("1.2")
            .unwrap_err()
            .to_string()
            .contains("accept value '1.2'")
    );
}

#[test]
fn sizes_are_rounded_up_to_sectors() {
    let size = |size| CreateOptions::new(size).build().unwrap().header.size;
    assert_eq!(
        [size(0), size(1), size(512), size(513)],
        [0, 512, 512, 1024]
    );
}

proptest! {
    #[test]
    fn headers_read_back_and_refcounts_cover_the_file(
        bits in 9u32..=21, order in 0u32..=6, size in 0u64..=2 << 60, shift in 0u32..62,
    ) {
        let options = CreateOptions {
            cluster_size: 1 << bits,
            refcount_bits: 1 << order,
            ..CreateOptions::new(size >> shift)
        };
        let Ok(image) = options.build() else {
            prop_assert!(size >> shift > 128 << 30);
            return Ok(());
        };
        let (offset, bytes) = image.chunks.last().unwrap();
        prop_assert_eq!(*offset, HostOffset(0));
        let parsed = Header::parse(bytes, image.file_len).unwrap();
        prop_assert_eq!(&parsed, &image.header);
        // One count of 1 for each cluster of the file and none behind.
        let clusters = image.file_len.div_ceil(1 << bits) as usize;
        let (_, counts) = &image.chunks[0];
        prop_assert_eq!(counts.len(), (clusters << order).div_ceil(8));
        for i in 0..(counts.len() * 8) >> order {
            prop_assert_eq!(refcount::get(counts, order, i), u64::from(i < clusters));
        }
        let blocks = (clusters as u64).div_ceil(image.header.geometry().refcounts_per_block());
        prop_assert_eq!(image.chunks[1].1.len() as u64, blocks * 8);
        prop_assert!(blocks * 8 <= image.header.reftable_bytes());
    }
}
