use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::crypto::luks1::Format;

const QUICK: Effort = Effort(Duration::from_millis(1));

fn made() -> Vec<u8> {
    let format = Format {
        spec: CipherSpec::parse("aes", "xts-plain64").unwrap(),
        key_len: 64,
        hash: Hash::Sha256,
        effort: QUICK,
    };
    make(&format, b"one").unwrap()
}

fn parse(region: &[u8]) -> Result<Header> {
    let copies: Vec<_> = places(&region[..4096], region.len() as u64)
        .into_iter()
        .map(|place| {
            let bytes = region[place.start as usize..place.end as usize].to_vec();
            (place.start, bytes)
        })
        .collect();
    Header::parse(&copies, region.len() as u64)
}

fn open(region: &[u8], passphrase: &[u8]) -> Option<VolumeKey> {
    let header = parse(region).unwrap();
    header.active().into_iter().find_map(|(slot, area)| {
        let material = &region[area.start as usize..area.end as usize];
        header
            .unlock(slot, material, passphrase, &Limits::default())
            .unwrap()
    })
}

fn apply(region: &mut [u8], change: &[Vec<super::super::luks::Chunk>]) {
    for (at, bytes) in change.iter().flatten() {
        region[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
    }
}

#[test]
fn passphrases_come_and_go_whenever_the_power_goes() {
    let mut region = made();
    assert_eq!(region.len(), 1_081_344);
    let key = open(&region, b"one").unwrap();
    assert!(open(&region, b"two").is_none());
    let mut header = parse(&region).unwrap();
    let (slot, change) = header.add(&key, b"two", None, QUICK).unwrap();
    assert_eq!(slot, 1);
    // Between any two steps, and in the middle of writing a copy.
    for steps in 0..change.len() {
        let mut cut = region.clone();
        apply(&mut cut, &change[..steps]);
        assert!(open(&cut, b"one").is_some(), "after {steps} steps");
        let (at, bytes) = &change[steps][0];
        cut[*at as usize..][..700].copy_from_slice(&bytes[..700]);
        assert!(open(&cut, b"one").is_some(), "in step {steps}");
    }
    apply(&mut region, &change);
    assert_eq!(open(&region, b"two").unwrap().expose(), key.expose());
    let mut header = parse(&region).unwrap();
    let change = header.remove(0).unwrap();
    for steps in 0..change.len() {
        let mut cut = region.clone();
        apply(&mut cut, &change[..steps]);
        assert!(open(&cut, b"two").is_some(), "after {steps} steps");
        assert_eq!(open(&cut, b"one").is_none(), steps > 0);
    }
    apply(&mut region, &change);
    assert!(open(&region, b"one").is_none() && open(&region, b"two").is_some());
    // Three keys are what there is room for.
    for passphrase in [b"a", b"b", b"c", b"d"] {
        let mut header = parse(&region).unwrap();
        match header.add(&key, passphrase, None, QUICK) {
            Ok((_, change)) => apply(&mut region, &change),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                assert!(open(&region, b"two").is_some());
                return;
            }
        }
    }
    panic!("there is room without end");
}

#[test]
fn either_copy_will_do_and_the_newer_one_counts() {
    let region = made();
    for damage in [0, 100, 449, 4100, 16384 + 16, 16384 + 5000] {
        let mut bad = region.clone();
        bad[damage] ^= 0x40;
        assert!(open(&bad, b"one").is_some(), "byte {damage}");
        bad[(damage + 16384) % 32768] ^= 0x40;
        let error = parse(&bad).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported),
            "{error}"
        );
    }
    let key = open(&region, b"one").unwrap();
    let mut header = parse(&region).unwrap();
    let (_, change) = header.add(&key, b"two", None, QUICK).unwrap();
    let mut newer = region;
    apply(&mut newer, &change[..2]);
    assert!(open(&newer, b"two").is_some(), "the second copy is newer");
}

/// Puts other JSON into both copies, with a right checksum.
fn with_json(region: &[u8], change: impl Fn(&mut serde_json::Value)) -> Vec<u8> {
    let copy = Copy::parse(&region[..16384], 0).unwrap();
    let mut json = serde_json::from_slice(&copy.json).unwrap();
    change(&mut json);
    let json = serde_json::to_vec(&json).unwrap();
    let mut region = region.to_vec();
    for at in [0, 16384] {
        let bytes = copy.next(&json, &[0; 64], at).unwrap();
        region[at as usize..at as usize + 16384].copy_from_slice(&bytes);
    }
    region
}

#[test]
fn hostile_json_is_refused() {
    use serde_json::json;
    let region = made();
    for (pointer, value, kind) in [
        ("/keyslots/0/area/offset", json!("0"), ErrorKind::Corrupt),
        (
            "/keyslots/0/area/offset",
            json!("18446744073709551615"),
            ErrorKind::Corrupt,
        ),
        ("/keyslots/0/area/offset", json!("x"), ErrorKind::Corrupt),
        (
            "/keyslots/0/area/size",
            json!("18446744073709551615"),
            ErrorKind::Corrupt,
        ),
        ("/keyslots/0/area/size", json!("4096"), ErrorKind::Corrupt),
        (
            "/keyslots/0/key_size",
            json!(1_u64 << 40),
            ErrorKind::Corrupt,
        ),
        ("/keyslots/0/area/key_size", json!(0), ErrorKind::Corrupt),
        (
            "/keyslots/0/af/stripes",
            json!(4_000_000_000_u32),
            ErrorKind::Corrupt,
        ),
        (
            "/config/keyslots_size",
            json!("18446744073709551615"),
            ErrorKind::Corrupt,
        ),
        ("/segments/0/sector_size", json!(513), ErrorKind::Corrupt),
        (
            "/segments/0/encryption",
            json!("rot13-xts-plain64"),
            ErrorKind::Unsupported,
        ),
        (
            "/segments/0/integrity",
            json!({"type": "hmac(sha256)"}),
            ErrorKind::Unsupported,
        ),
        ("/segments/0/type", json!("linear"), ErrorKind::Unsupported),
        (
            "/config/requirements",
            json!({"mandatory": ["online-reencrypt"]}),
            ErrorKind::Unsupported,
        ),
        (
            "/segments/1",
            json!({"type": "crypt"}),
            ErrorKind::Unsupported,
        ),
    ] {
        let bad = with_json(&region, |json| {
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            json.pointer_mut(parent).unwrap()[name] = value.clone();
        });
        let error = parse(&bad).unwrap_err();
        assert_eq!(error.kind(), kind, "{pointer}: {error}");
    }
}

/// What would take all memory, or for ever, is refused before it begins.
#[test]
fn work_is_bounded() {
    use serde_json::json;
    let region = made();
    for (name, value, cure) in [
        ("memory", json!(u32::MAX), "--key-memory"),
        ("memory", json!((1 << 20) + 1), "--key-memory"),
        ("time", json!(u32::MAX), "--key-iterations"),
    ] {
        let bad = with_json(&region, |json| {
            json["keyslots"]["0"]["kdf"][name] = value.clone();
            if name == "time" {
                json["keyslots"]["0"]["kdf"]["memory"] = json!(1024);
            }
        });
        let header = parse(&bad).unwrap();
        let (slot, area) = header.active().remove(0);
        let material = &bad[area.start as usize..area.end as usize];
        let error = header
            .unlock(slot, material, b"one", &Limits::default())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Policy);
        assert!(error.cure_text().unwrap().contains(cure), "{error:?}");
    }
}

#[test]
fn unknown_parts_of_the_json_stay() {
    let region = with_json(&made(), |json| {
        json["tokens"]["0"] = serde_json::json!({"type": "x", "keyslots": []});
        json["future"] = serde_json::json!([1, 2]);
        json["keyslots"]["0"]["priority"] = serde_json::json!(2);
    });
    let key = open(&region, b"one").unwrap();
    let mut header = parse(&region).unwrap();
    let (_, change) = header.add(&key, b"two", Some(7), QUICK).unwrap();
    let mut region = region;
    apply(&mut region, &change);
    let copy = Copy::parse(&region[..16384], 0).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&copy.json).unwrap();
    assert_eq!(json["tokens"]["0"]["type"], "x");
    assert_eq!(json["future"][1], 2);
    assert_eq!(json["keyslots"]["0"]["priority"], 2);
    assert!(json["keyslots"]["7"].is_object());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_damage_is_fatal(at in 0..32768_usize, byte in any::<u8>(), cut in 4096..40000_usize) {
        static REGION: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let region = REGION.get_or_init(made);
        let mut bad = region[..cut.max(4096)].to_vec();
        if let Some(place) = bad.get_mut(at) {
            *place = byte;
        }
        let _ = parse(&bad);
        // With a right checksum, anything may be in the JSON.
        let bad = with_json(region, |json| {
            let text = json.to_string();
            let mut bytes = text.clone().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(changed) = serde_json::from_slice(&bytes) {
                *json = changed;
            }
        });
        if let Ok(header) = parse(&bad) {
            for (_, area) in header.active() {
                prop_assert!(area.end <= bad.len() as u64);
            }
        }
    }
}
