//! Compressed clusters: whatever the stream, an answer in bounded space; what
//! was compressed comes back; descriptors lead where they were made for.

use qcow2_ublk::codec::{self, CompressionType};
use qcow2_ublk::qcow2::CompressedRange;
use qcow2_ublk::qcow2::spec::{Geometry, HostOffset, L2Entry};

use super::input::Input;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mode = input.u8();
    let kind = if mode & 1 == 0 {
        CompressionType::Deflate
    } else {
        CompressionType::Zstd
    };
    let size = 512 << (input.u8() % 9);
    match mode >> 1 & 3 {
        0 | 1 => streams(kind, size, input.0),
        2 => comes_back(kind, size, &mut input),
        _ => descriptors(&mut input),
    }
}

fn streams(kind: CompressionType, size: usize, stream: &[u8]) {
    // What the buffer held before makes no difference; what follows neither.
    let mut first = vec![0; size];
    let mut second = vec![0xee; size];
    let once = codec::decompress(kind, stream, &mut first);
    let again = codec::decompress(kind, stream, &mut second);
    assert_eq!(once.is_ok(), again.is_ok());
    match once {
        Ok(()) => {
            assert!(first == second, "the same stream, other bytes");
            let longer = [stream, &[0x5a; 40]].concat();
            if codec::decompress(kind, &longer, &mut second).is_ok() {
                assert!(first == second, "what follows a stream is in the cluster");
            }
        }
        Err(error) => super::header::is_said_well(&error),
    }
}

fn comes_back(kind: CompressionType, size: usize, input: &mut Input<'_>) {
    let level = i32::from(input.u8() as i8);
    // Bytes, and pieces of what was before.
    let mut cluster = Vec::with_capacity(size);
    while cluster.len() < size && !input.is_empty() {
        let what = usize::from(input.u8());
        if what < 128 {
            cluster.extend(input.bytes(1 + what));
        } else {
            let back = 1 + usize::from(input.u16());
            for _ in 0..(what - 126) * 4 {
                let byte = cluster.len().checked_sub(back).map_or(0, |at| cluster[at]);
                cluster.push(byte);
            }
        }
    }
    cluster.resize(size, 0);
    let mut packed = vec![0; size];
    let Some(len) = codec::compress(kind, level, &cluster, &mut packed) else {
        return;
    };
    assert!(len < size, "it is stored only if it is smaller");
    let mut back = vec![0xee; size];
    codec::decompress(kind, &packed[..len], &mut back).expect("our own");
    assert!(back == cluster, "it is another cluster");
    // With no room it gives up, and with just enough it does not.
    assert_eq!(
        codec::compress(kind, level, &cluster, &mut packed[..len / 2]),
        None
    );
    let again = codec::compress(kind, level, &cluster, &mut packed[..len]);
    assert!(again.is_none_or(|again| again == len));
}

fn descriptors(input: &mut Input<'_>) {
    while !input.is_empty() {
        let geometry = Geometry {
            cluster_bits: 9 + u32::from(input.u8() % 13),
            refcount_order: 4,
            version: 3,
            extended_l2: false,
            external_data: false,
        };
        let (offset, len) = (
            input.u64() >> (input.u8() % 64),
            u64::from(input.u32() >> 8),
        );
        let Some(range) = CompressedRange::new(HostOffset(offset), len, &geometry) else {
            continue;
        };
        assert!(range.offset.0 == offset && (len..len + 512).contains(&range.max_len));
        let entry = L2Entry::Compressed(range);
        if offset >= geometry.cluster_size() {
            assert_eq!(
                L2Entry::decode(entry.encode(&geometry), &geometry),
                Ok(entry)
            );
        }
        let touched = range.clusters_touched(&geometry);
        assert_eq!(*touched.start(), offset >> geometry.cluster_bits);
        assert_eq!(
            *touched.end(),
            (offset + range.max_len - 1) >> geometry.cluster_bits
        );
    }
}
