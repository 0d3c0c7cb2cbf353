use std::time::Duration;

use proptest::prelude::*;

use super::*;

const QUICK: Effort = Effort(Duration::from_millis(1));

fn format() -> Format {
    Format {
        effort: QUICK,
        ..Format::default()
    }
}

fn open(region: &[u8], passphrase: &[u8]) -> Result<Option<VolumeKey>> {
    let header = Header::parse(region, region.len() as u64)?;
    for (slot, area) in header.active() {
        let material = &region[area.start as usize..area.end as usize];
        if let Some(key) = header.unlock(slot, material, passphrase, &Limits::default())? {
            return Ok(Some(key));
        }
    }
    Ok(None)
}

fn apply(region: &mut [u8], change: &Change) {
    for (at, bytes) in change.iter().flatten() {
        region[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
    }
}

#[test]
fn a_new_header_has_qemus_layout_and_opens() {
    let region = format().make(b"secret").unwrap();
    assert_eq!(region.len(), 2_068_480);
    let header = Header::parse(&region, region.len() as u64).unwrap();
    assert_eq!(header.encode(), region[..HEADER_LEN]);
    assert_eq!((header.slots[0].sector, header.slots[1].sector), (8, 512));
    assert!(open(&region, b"secret").unwrap().is_some());
    assert!(open(&region, b"Secret").unwrap().is_none());
    assert!(open(&region, b"secret\n").unwrap().is_none());
    assert!(open(&region, b"").unwrap().is_none());
}

#[test]
fn passphrases_come_and_go_in_safe_steps() {
    let mut region = format().make(b"one").unwrap();
    let key = open(&region, b"one").unwrap().unwrap();
    let mut header = Header::parse(&region, region.len() as u64).unwrap();
    let (slot, change) = header.add(&key, b"two", None, QUICK).unwrap();
    assert_eq!(slot, 1);
    // The power goes after the first step, or in the middle of it.
    let mut cut = region.clone();
    apply(&mut cut, &vec![change[0].clone()]);
    assert!(open(&cut, b"one").unwrap().is_some());
    assert!(open(&cut, b"two").unwrap().is_none());
    apply(&mut region, &change);
    for passphrase in [&b"one"[..], b"two"] {
        let found = open(&region, passphrase).unwrap().unwrap();
        assert_eq!(found.expose(), key.expose());
    }
    assert_eq!(header.encode(), region[..HEADER_LEN]);

    let old = region.clone();
    let change = header.remove(0).unwrap();
    let mut cut = region.clone();
    apply(&mut cut, &vec![change[0].clone()]);
    assert!(open(&cut, b"one").unwrap().is_none(), "wiped first of all");
    assert!(open(&cut, b"two").unwrap().is_some());
    apply(&mut region, &change);
    assert!(open(&region, b"one").unwrap().is_none());
    assert!(open(&region, b"two").unwrap().is_some());
    let area = header.area(0);
    let area = area.start as usize..area.end as usize;
    let same = old[area.clone()]
        .iter()
        .zip(&region[area.clone()])
        .filter(|(a, b)| a == b)
        .count();
    assert!(same < area.len() / 100, "{same} bytes of key material stay");
    assert_eq!(header.encode(), region[..HEADER_LEN]);
    assert_eq!(header.add(&key, b"three", None, QUICK).unwrap().0, 0);
    let taken = header.add(&key, b"four", Some(1), QUICK).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Usage);
}

#[test]
fn all_slots_can_be_taken() {
    let mut region = format().make(b"0").unwrap();
    let key = open(&region, b"0").unwrap().unwrap();
    let mut header = Header::parse(&region, region.len() as u64).unwrap();
    for slot in 1..SLOTS {
        let passphrase = slot.to_string();
        let (found, change) = header
            .add(&key, passphrase.as_bytes(), None, QUICK)
            .unwrap();
        assert_eq!(found, slot);
        apply(&mut region, &change);
    }
    let full = header.add(&key, b"9", None, QUICK).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::NoSpace);
    assert!(open(&region, b"7").unwrap().is_some());
}

/// Each hostile number is refused before anything is computed with it.
#[test]
fn hostile_numbers_are_refused() {
    let region = format().make(b"x").unwrap();
    let be = |n: u32| n.to_be_bytes().to_vec();
    let damaged = ErrorKind::Corrupt;
    let unsupported = ErrorKind::Unsupported;
    for (at, bytes, kind, says) in [
        (0, vec![0], damaged, "does not begin"),
        (7, vec![3], unsupported, "LUKS version 3"),
        (8, b"rot13\0".to_vec(), unsupported, "rot13"),
        (8, vec![b'a'; 32], damaged, "not text"),
        (40, b"xts-random\0".to_vec(), unsupported, "xts-random"),
        (72, b"crc32\0".to_vec(), unsupported, "crc32"),
        (108, be(0), damaged, "0 bytes"),
        (108, be(u32::MAX), damaged, "4294967295 bytes"),
        (108, be(40), unsupported, "40 bytes"),
        (164, be(0), damaged, "no iterations"),
        (208, be(1), damaged, "state 0x1"),
        (212, be(0), damaged, "no iterations"),
        (248, be(0), damaged, "outside"),
        (248, be(u32::MAX), damaged, "outside"),
        (248 + 48, be(8), damaged, "overlap"),
        (252, be(u32::MAX), damaged, "stripes"),
    ] {
        let mut bad = region.clone();
        bad[at..at + bytes.len()].copy_from_slice(&bytes);
        let error = Header::parse(&bad, region.len() as u64).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    for at in [164, 212] {
        let mut bad = region.clone();
        bad[at..at + 4].copy_from_slice(&be(u32::MAX));
        let error = open(&bad, b"x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Policy);
        assert!(error.cure_text().unwrap().contains("--key-iterations"));
    }
    let short = Header::parse(&region, 2_068_479 - 4096).unwrap_err();
    assert!(short.to_string().contains("outside"), "{short}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_make_parsing_fail_badly(
        bytes in proptest::collection::vec(any::<u8>(), 0..700),
        region in any::<u64>(),
    ) {
        let _ = Header::parse(&bytes, region);
    }

    /// Changes to a sound header: an error, or a header whose places are
    /// inside.
    #[test]
    fn damage_is_noticed_or_harmless(at in 0..HEADER_LEN, byte in any::<u8>(), at2 in 0..HEADER_LEN, byte2 in any::<u8>()) {
        static REGION: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let region = REGION.get_or_init(|| format().make(b"x").unwrap());
        let mut head = region[..HEADER_LEN].to_vec();
        head[at] = byte;
        head[at2] = byte2;
        if let Ok(header) = Header::parse(&head, region.len() as u64) {
            for slot in 0..SLOTS {
                prop_assert!(header.area(slot).end <= region.len() as u64);
            }
            let again = Header::parse(&header.encode(), region.len() as u64);
            prop_assert_eq!(again.unwrap(), header);
        }
    }
}
