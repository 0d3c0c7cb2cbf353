//! The header and its extensions: whatever the bytes, an answer; and what is
//! read says the same when it is written again.

use qcow2_ublk::qcow2::spec::header::{
    L1_AT, PROBE_LEN, Prefix, REFTABLE_AT, SIZE_AT, SNAPSHOTS_AT,
};
use qcow2_ublk::qcow2::spec::{Header, HostOffset};
use qcow2_ublk::{Error, ErrorKind};

use super::input::Input;
use super::recipe;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    // The header of a recipe's image, or bytes as they are.
    let (bytes, file_len) = if input.flag() {
        let image = recipe::image(&mut input);
        (image.bytes(0, (64 << 10).min(image.len())), image.len())
    } else {
        let shift = input.u8() % 32;
        let len = u64::from(input.u32()) << shift;
        (input.0.to_vec(), len)
    };
    let prefix = Prefix::parse(&bytes[..PROBE_LEN.min(bytes.len())]);
    let strict = Header::parse(&bytes, file_len);
    let damaged = Header::parse_damaged(&bytes);
    match &prefix {
        Ok(prefix) => {
            let size = prefix.cluster_size();
            assert!(size.is_power_of_two() && (512..=2 << 20).contains(&size));
        }
        Err(error) => {
            is_said_well(error);
            assert!(strict.is_err() && damaged.is_err());
        }
    }
    if let (Ok(strict), damaged) = (&strict, &damaged) {
        assert_eq!(damaged.as_ref().ok(), Some(strict), "less strict is more");
    }
    for header in [strict, damaged] {
        match header {
            Ok(header) => comes_back(&header, file_len),
            Err(error) => is_said_well(&error),
        }
    }
}

fn comes_back(header: &Header, file_len: u64) {
    let geometry = header.geometry();
    assert!((9..=21).contains(&geometry.cluster_bits) && geometry.refcount_order <= 6);
    assert!(header.virtual_size() <= geometry.max_size());
    assert!(header.l1_bytes() <= 32 << 20 && header.reftable_bytes() <= 8 << 20);
    assert!(geometry.l1_entries_for(header.virtual_size()) <= header.l1_size.into());
    let bytes = match header.encode() {
        Ok(bytes) => bytes,
        Err(error) => {
            // What was read with its tables anywhere, or filled its cluster to
            // the last byte, need not be writable.
            assert!(matches!(
                error.kind(),
                ErrorKind::Usage | ErrorKind::InvalidFormat
            ));
            return;
        }
    };
    let again = Header::parse_damaged(&bytes).expect("what was written can be read");
    assert_eq!(again, *header);
    // Parts that are written alone are as in the whole.
    let part = |at: HostOffset, part: &[u8]| {
        assert_eq!(&bytes[at.0 as usize..][..part.len()], part);
    };
    part(L1_AT, &header.l1_update());
    part(REFTABLE_AT, &header.reftable_update());
    part(SNAPSHOTS_AT, &header.snapshots_update());
    if file_len > 0 && Header::parse(&bytes, file_len).is_ok() {
        part(SIZE_AT, &header.switch_update());
    }
}

/// An error says something.
pub fn is_said_well(error: &Error) {
    let said = error.to_string();
    assert!(said.len() > 8 && said.len() < 8192, "{said:?}");
    assert_ne!(
        error.kind(),
        ErrorKind::Usage,
        "{said}: nobody asked for anything"
    );
}
