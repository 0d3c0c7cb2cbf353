//! Streams as others write them, damaged streams, and what our own may use.

use proptest::prelude::*;

use super::*;

const KINDS: [CompressionType; 2] = [CompressionType::Deflate, CompressionType::Zstd];
const CLUSTER: usize = 65536;

/// A cluster's worth of bytes: half of it repetitive, half noise, and with
/// repetitions at every distance.
fn cluster(len: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut bytes: Vec<u8> = (0..len / 4)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect();
    bytes.resize(len / 2, b'x');
    let again = bytes.clone();
    bytes.extend_from_slice(&again);
    bytes.resize(len, 0);
    bytes
}

#[test]
fn round_trips_at_every_level_and_size() {
    for kind in KINDS {
        for bits in 9..=21 {
            let input = cluster(1 << bits);
            let mut packed = vec![0; input.len()];
            for level in [-5, 1, kind.default_level(), i32::MAX] {
                let len = compress(kind, level, &input, &mut packed).unwrap();
                assert!(len < input.len());
                // Behind the stream: the rest of the last sector.
                let end = (len + 511).min(packed.len());
                packed[len..end].fill(0xa5);
                let mut output = vec![1; input.len()];
                decompress(kind, &packed[..end], &mut output).unwrap();
                assert!(output == input, "{kind:?} {bits} {level}");
            }
        }
    }
}

/// What a failure leaves behind must not add up until there is a panic.
#[test]
fn many_incompressible_clusters_in_a_row() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for kind in KINDS {
        for level in [1, 6, 9] {
            for len in [512, 4096, CLUSTER] {
                let mut packed = vec![0; len];
                for _ in 0..(512 << 10) / len {
                    let noise: Vec<u8> = (0..len)
                        .map(|_| {
                            state ^= state << 13;
                            state ^= state >> 7;
                            state ^= state << 17;
                            state as u8
                        })
                        .collect();
                    assert_eq!(compress(kind, level, &noise, &mut packed), None);
                }
                let input = cluster(len);
                let packed_len = compress(kind, level, &input, &mut packed).unwrap();
                let mut output = vec![1; len];
                decompress(kind, &packed[..packed_len], &mut output).unwrap();
                assert!(output == input, "{kind:?} {level} {len}");
            }
        }
    }
}

#[test]
fn incompressible_clusters_are_left_alone() {
    for kind in KINDS {
        let noise: Vec<u8> = (0..512u32)
            .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        let mut packed = vec![0; 2 * noise.len()];
        assert_eq!(compress(kind, 9, &noise, &mut packed), None);
        assert_eq!(compress(kind, 9, &cluster(4096), &mut [0; 100]), None);
        assert_eq!(compress(kind, 9, &[], &mut packed), None);
        // A failure leaves nothing behind for the next one.
        assert!(compress(kind, 9, &cluster(4096), &mut packed).is_some());
    }
}

/// Readers with a window of 12 bits, as QEMU's, must not be asked for more.
#[test]
fn deflate_stays_within_a_window_of_12_bits() {
    let near = cluster(2048);
    let far = cluster(16384)[..8192].to_vec();
    let input = [near.repeat(8), far.repeat(6)].concat();
    let mut packed = vec![0; CLUSTER];
    for level in 1..=9 {
        let len = compress(CompressionType::Deflate, level, &input, &mut packed).unwrap();
        let (output, farthest) = inflate_oracle::inflate(&packed[..len]);
        assert!(
            output == input && farthest <= 4096,
            "level {level}: {farthest}"
        );
    }
    // A compressor that may do more with this input does.
    let len = wide_deflate(&input, &mut packed);
    let (output, farthest) = inflate_oracle::inflate(&packed[..len]);
    assert!(output == input && farthest > 4096);
}

/// A stream with a window of 15 bits; its length.
fn wide_deflate(input: &[u8], packed: &mut [u8]) -> usize {
    let mut wide = flate2::Compress::new(flate2::Compression::new(9), false);
    wide.compress(input, packed, flate2::FlushCompress::Finish)
        .unwrap();
    wide.total_out() as usize
}

#[test]
fn deflate_with_a_window_of_15_bits_is_read() {
    let input = cluster(CLUSTER);
    let mut packed = vec![0; CLUSTER];
    wide_deflate(&input, &mut packed);
    let mut output = vec![0; CLUSTER];
    decompress(CompressionType::Deflate, &packed, &mut output).unwrap();
    assert!(output == input);
}

#[test]
fn several_zstd_frames_make_a_cluster() {
    let input = cluster(CLUSTER);
    let frame = |bytes: &[u8]| ::zstd::bulk::compress(bytes, 3).unwrap();
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let parts = [
        frame(&input[..10]),
        frame(&[]),
        skippable.to_vec(),
        frame(&input[10..40_000]),
        frame(&input[40_000..]),
        b"what follows in the sector".to_vec(),
    ];
    let mut output = vec![0; CLUSTER];
    decompress(CompressionType::Zstd, &parts.concat(), &mut output).unwrap();
    assert!(output == input);
    // One frame too few, with and without something behind.
    for parts in [&parts[..4], &[&parts[..4], &parts[5..]].concat()] {
        assert!(decompress(CompressionType::Zstd, &parts.concat(), &mut output).is_err());
    }
}

/// A frame that asks for a window of 1 GiB but holds a cluster only.
#[test]
fn zstd_windows_cost_nothing() {
    let window_log = 30u8;
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (window_log - 10) << 3];
    // A last block, run-length encoded: a byte 65536 times.
    let header = (CLUSTER as u32) << 3 | 1 << 1 | 1;
    frame.extend_from_slice(&header.to_le_bytes()[..3]);
    frame.push(b'w');
    let mut output = vec![0; CLUSTER];
    decompress(CompressionType::Zstd, &frame, &mut output).unwrap();
    assert!(output.iter().all(|&b| b == b'w'));
}

#[test]
fn damage_is_corruption() {
    let mut packed = vec![0; CLUSTER];
    for kind in KINDS {
        let len = compress(kind, 3, &cluster(CLUSTER), &mut packed).unwrap();
        let mut output = vec![0; CLUSTER];
        let mut fails = |input: &[u8]| {
            let error = decompress(kind, input, &mut output).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains(kind.name()), "{error}");
        };
        fails(&[]);
        fails(&packed[..len / 2]);
        fails(&[0xff; 512]);
        // Half a cluster, then nothing, or zeros.
        let len = compress(kind, 3, &cluster(CLUSTER / 2), &mut packed).unwrap();
        fails(&packed[..len]);
        packed[len..len + 512].fill(0);
        fails(&packed[..len + 512]);
        // The context is good for the next one all the same.
        let input = cluster(CLUSTER);
        let len = compress(kind, 3, &input, &mut packed).unwrap();
        decompress(kind, &packed[..len], &mut output).unwrap();
        assert!(output == input);
    }
}

/// A deflate stream may go on past the cluster (QEMU stops there too); a zstd
/// frame may not.
#[test]
fn streams_longer_than_a_cluster() {
    let input = cluster(CLUSTER);
    let mut packed = vec![0; CLUSTER];
    let mut output = vec![0; CLUSTER / 2];
    let len = compress(CompressionType::Deflate, 6, &input, &mut packed).unwrap();
    decompress(CompressionType::Deflate, &packed[..len], &mut output).unwrap();
    assert!(output == input[..CLUSTER / 2]);
    let len = compress(CompressionType::Zstd, 3, &input, &mut packed).unwrap();
    let error = decompress(CompressionType::Zstd, &packed[..len], &mut output).unwrap_err();
    assert!(error.to_string().contains("more than a cluster"), "{error}");
}

proptest! {
    #[test]
    fn random_streams_never_panic(mut bytes: Vec<u8>, zstd_magic: bool) {
        if zstd_magic && bytes.len() > 4 {
            bytes[..4].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        }
        for kind in KINDS {
            let _ = decompress(kind, &bytes, &mut [0; 4096]);
        }
    }

    #[test]
    fn damaged_streams_never_panic(at in 0usize..2000, byte: u8) {
        let input = cluster(4096);
        for kind in KINDS {
            let mut packed = vec![0; 4096];
            let len = compress(kind, 3, &input, &mut packed).unwrap();
            packed[at % len] = byte;
            let _ = decompress(kind, &packed[..len], &mut vec![0; 4096]);
        }
    }
}
