//! Snapshot table entries of every age, and broken ones.

use proptest::prelude::*;

use super::*;

const GEOMETRY: Geometry = Geometry {
    cluster_bits: 16,
    refcount_order: 4,
    version: 3,
    extended_l2: false,
    external_data: false,
};
const AT: HostOffset = HostOffset(0x7_0000);

fn snapshot() -> Snapshot {
    Snapshot {
        l1_table_offset: HostOffset(0x5_0000),
        l1_size: 3,
        id: b"1".to_vec(),
        name: b"before the upgrade".to_vec(),
        date_sec: 1_700_000_000,
        date_nsec: 5,
        vm_clock_nsec: 6,
        vm_state_size: 1 << 33,
        has_vm_state_64: true,
        disk_size: Some(1 << 30),
        icount: Some(u64::MAX),
        unknown_extra: vec![9; 5],
    }
}

fn round_trip(snapshot: &Snapshot) -> Snapshot {
    let mut bytes = Vec::new();
    snapshot.encode(&mut bytes).unwrap();
    assert_eq!(entry_len(&bytes[..HEAD_LEN], AT).unwrap(), bytes.len());
    let (parsed, len) = Snapshot::parse(&bytes, AT, &GEOMETRY).unwrap();
    assert_eq!(len, bytes.len());
    parsed
}

#[test]
fn round_trips_at_every_length_of_extra_data() {
    let full = snapshot();
    assert_eq!(round_trip(&full), full);
    let no_icount = Snapshot {
        icount: None,
        unknown_extra: vec![1; 3],
        ..snapshot()
    };
    assert_eq!(round_trip(&no_icount), no_icount);
    let no_size = Snapshot {
        disk_size: None,
        unknown_extra: vec![1; 7],
        ..no_icount
    };
    assert_eq!(round_trip(&no_size), no_size);
    assert!(no_size.lacks_required_extra(&GEOMETRY) && !full.lacks_required_extra(&GEOMETRY));
    let old = Snapshot {
        has_vm_state_64: false,
        vm_state_size: 77,
        unknown_extra: Vec::new(),
        ..no_size
    };
    assert_eq!(round_trip(&old), old);
}

#[test]
fn impossible_entries_are_refused() {
    let mut good = Vec::new();
    snapshot().encode(&mut good).unwrap();
    let cases: [(usize, &[u8], &str); 6] = [
        (6, &[2], "offset"),
        (0, &[0; 8], "offset"),
        (0, &[0xff; 6], "offset"),
        (8, &[0xff; 4], "too large"),
        (12, &[0xff; 2], "ends inside"),
        (36, &[0xff; 4], "Too much extra"),
    ];
    for (at, patch, expected) in cases {
        let mut bytes = good.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        let error = Snapshot::parse(&bytes, AT, &GEOMETRY).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    for len in 0..good.len() - 8 {
        assert!(Snapshot::parse(&good[..len], AT, &GEOMETRY).is_err());
    }
    let huge = Snapshot {
        has_vm_state_64: false,
        ..snapshot()
    };
    assert_eq!(
        huge.encode(&mut Vec::new()).unwrap_err().kind(),
        ErrorKind::Usage
    );
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes: Vec<u8>) {
        let _ = Snapshot::parse(&bytes, AT, &GEOMETRY);
    }

    #[test]
    fn damaged_entries_never_panic_and_encode_back(at in 0usize..64, byte: u8) {
        let mut bytes = Vec::new();
        snapshot().encode(&mut bytes).unwrap();
        bytes[at] = byte;
        if let Ok((parsed, len)) = Snapshot::parse(&bytes, AT, &GEOMETRY) {
            let mut again = Vec::new();
            parsed.encode(&mut again).unwrap();
            prop_assert_eq!(again.len(), len);
            // The 32-bit VM state size is redundant beside the 64-bit one,
            // and what follows a shortened entry is not part of it.
            let (same, _) = Snapshot::parse(&again, AT, &GEOMETRY).unwrap();
            prop_assert_eq!(same, parsed);
        }
    }
}
