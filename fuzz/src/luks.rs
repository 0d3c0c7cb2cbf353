//! LUKS headers of both versions: whatever the bytes, an answer that costs no
//! more than is allowed; what is read says the same when it is written; keys
//! come and go.

use std::sync::OnceLock;
use std::time::Duration;

use qcow2_ublk::crypto::luks::{self, Change};
use qcow2_ublk::crypto::{Effort, Limits, luks1, luks2};
use sha2::{Digest, Sha256};

use super::input::Input;

const PASSPHRASE: &[u8] = b"passphrase";
/// An image may ask for this much work.
const LIMITS: Limits = Limits {
    memory: 1 << 20,
    iterations: 3000,
};

/// As little work as there is.
fn format() -> luks1::Format {
    luks1::Format {
        key_len: 32,
        effort: Effort(Duration::ZERO),
        ..luks1::Format::default()
    }
}

pub fn run_v1(data: &[u8]) {
    static REGION: OnceLock<Vec<u8>> = OnceLock::new();
    let region = REGION.get_or_init(|| format().make(PASSPHRASE).expect("a header"));
    let mut input = Input(data);
    if input.flag() {
        // Bytes as they are.
        if let Ok(header) = luks1::Header::parse(input.0, 1 << 21) {
            comes_back(&header);
        }
        let _ = qcow2_ublk::qcow2::spec::luks::LuksInfo::parse(input.0);
        return;
    }
    let mut region = region.clone();
    let all = input.flag();
    let changed = patch(&mut input, &mut region[..luks1::HEADER_LEN]);
    let _ = qcow2_ublk::qcow2::spec::luks::LuksInfo::parse(&region);
    let len = region.len() as u64;
    match luks1::Header::parse(&region, len) {
        Ok(header) => {
            comes_back(&header);
            keys(luks::Header::V1(Box::new(header)), region, changed, all);
        }
        Err(error) => super::header::is_said_well(&error),
    }
}

fn comes_back(header: &luks1::Header) {
    let bytes = header.encode();
    let again = luks1::Header::parse(&bytes, 1 << 40);
    assert_eq!(again.expect("our own"), *header);
}

pub fn run_v2(data: &[u8]) {
    static REGION: OnceLock<Vec<u8>> = OnceLock::new();
    let region = REGION.get_or_init(|| luks2::make(&format(), PASSPHRASE).expect("a header"));
    let mut region = region.clone();
    let mut input = Input(data);
    let mode = input.u8();
    const COPY: usize = 16 << 10;
    let json = 4096..COPY;
    let mut changed = true;
    match mode & 3 {
        // JSON of the input's own.
        0 => {
            region[json.clone()].fill(0);
            let text = input.bytes(json.len() - 1);
            region[json.start..json.start + text.len()].copy_from_slice(text);
        }
        // Words of the JSON exchanged for others.
        1 | 2 => changed = exchange(&mut input, &mut region[json]),
        _ => changed = patch(&mut input, &mut region[..4096]),
    }
    // The second copy says the same, or it is not there, or it is old.
    let (first, rest) = region.split_at_mut(COPY);
    match mode >> 2 & 3 {
        0 => rest[..COPY].fill(0),
        1 => {
            rest[..COPY].copy_from_slice(first);
            rest[..6].copy_from_slice(b"SKUL\xba\xbe");
            rest[256..264].copy_from_slice(&(COPY as u64).to_be_bytes());
            sum(&mut rest[..COPY]);
        }
        _ => {}
    }
    if mode & 32 == 0 {
        sum(first);
    }
    let len = region.len() as u64;
    let Some(header) = parse_v2(&region, len) else {
        assert!(changed, "the header is as it was made");
        return;
    };
    keys(
        luks::Header::V2(Box::new(header)),
        region,
        true,
        mode & 64 != 0,
    );
}

fn parse_v2(region: &[u8], len: u64) -> Option<luks2::Header> {
    let places = luks2::places(&region[..4096.min(region.len())], len);
    let copies: Vec<_> = places
        .into_iter()
        .map(|place| {
            (
                place.start,
                region[place.start as usize..place.end as usize].to_vec(),
            )
        })
        .collect();
    match luks2::Header::parse(&copies, len) {
        Ok(header) => Some(header),
        Err(error) => {
            super::header::is_said_well(&error);
            None
        }
    }
}

/// Stores the right checksum: without it nothing else would be looked at.
fn sum(copy: &mut [u8]) {
    copy[448..512].fill(0);
    let sum = Sha256::digest(&*copy);
    copy[448..448 + sum.len()].copy_from_slice(&sum);
}

/// Changes some bytes; whether any.
fn patch(input: &mut Input<'_>, bytes: &mut [u8]) -> bool {
    let before = bytes.to_vec();
    while !input.is_empty() {
        let at = usize::from(input.u16()) % bytes.len();
        let len = (1 + usize::from(input.u8() % 16)).min(bytes.len() - at);
        let new = input.bytes(len);
        bytes[at..at + new.len()].copy_from_slice(new);
    }
    bytes != before
}

/// Exchanges numbers and words of the JSON for others; whether any.
fn exchange(input: &mut Input<'_>, area: &mut [u8]) -> bool {
    const OTHERS: [&str; 24] = [
        "0",
        "1",
        "-1",
        "31",
        "32",
        "4294967295",
        "4294967296",
        "18446744073709551615",
        "1e308",
        "\"0\"",
        "\"18446744073709551615\"",
        "\"-1\"",
        "\"\"",
        "null",
        "true",
        "[]",
        "{}",
        "\"dynamic\"",
        "\"aes-xts-plain64\"",
        "\"aes-cbc-essiv:sha256\"",
        "\"luks2\"",
        "\"argon2id\"",
        "[\"0\"]",
        "\"raw\"",
    ];
    let end = area.iter().position(|&b| b == 0).unwrap_or(area.len());
    let before = String::from_utf8_lossy(&area[..end]).into_owned();
    let mut text = before.clone();
    for _ in 0..8 {
        if input.is_empty() {
            break;
        }
        // A value begins behind a colon and ends before a comma or a bracket.
        let starts: Vec<usize> = text.match_indices(':').map(|(at, _)| at + 1).collect();
        if starts.is_empty() {
            break;
        }
        let start = starts[usize::from(input.u8()) % starts.len()];
        let len = text[start..].find([',', '}', ']']).unwrap_or(0);
        let other = match input.u8() {
            n @ 0..200 => OTHERS[usize::from(n) % OTHERS.len()].to_owned(),
            _ => input.u32().to_string(),
        };
        text.replace_range(start..start + len, &other);
    }
    area.fill(0);
    let len = text.len().min(area.len() - 1);
    area[..len].copy_from_slice(&text.as_bytes()[..len]);
    text != before
}

/// Passphrases, as far as the header lets us: one is tried; with `all` another
/// is added, and the first removed. That takes ten times as long as reading a
/// header: it is done when the input says so.
fn keys(mut header: luks::Header, mut region: Vec<u8>, changed: bool, all: bool) {
    let len = region.len() as u64;
    let active = header.active();
    assert!(header.slots().iter().filter(|slot| slot.active).count() == active.len());
    for (_, area) in &active {
        assert!(
            area.start < area.end && area.end <= len,
            "{area:?} of {len}"
        );
    }
    let Some((slot, area)) = active.first().cloned() else {
        return;
    };
    let material = &region[area.start as usize..area.end as usize];
    let key = match header.unlock(slot, material, PASSPHRASE, &LIMITS) {
        Ok(Some(key)) => key,
        Ok(None) => return assert!(changed, "it is as it was made"),
        Err(error) => return super::header::is_said_well(&error),
    };
    let _ = header.disk_cipher(&key);
    if !all {
        return;
    }
    let Ok((other, change)) = header.add(&key, b"other", None, Effort(Duration::ZERO)) else {
        return;
    };
    apply(&change, &mut region);
    let v2 = matches!(header, luks::Header::V2(_));
    let mut header = again(v2, &region);
    opens(&header, other, &region, b"other");
    let change = header.remove(slot).expect("it is active");
    apply(&change, &mut region);
    let header = again(v2, &region);
    assert!(header.active().iter().all(|(number, _)| *number != slot));
    opens(&header, other, &region, b"other");
}

fn apply(change: &Change, region: &mut [u8]) {
    for (at, bytes) in change.iter().flatten() {
        region[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
    }
}

fn again(v2: bool, region: &[u8]) -> luks::Header {
    let len = region.len() as u64;
    if v2 {
        luks::Header::V2(Box::new(parse_v2(region, len).expect("our own")))
    } else {
        luks::Header::V1(Box::new(
            luks1::Header::parse(region, len).expect("our own"),
        ))
    }
}

fn opens(header: &luks::Header, slot: usize, region: &[u8], passphrase: &[u8]) {
    let active = header.active();
    let (_, area) = active
        .iter()
        .find(|(n, _)| *n == slot)
        .expect("it was added");
    let material = &region[area.start as usize..area.end as usize];
    let key = header.unlock(slot, material, passphrase, &Limits::default());
    assert!(
        key.expect("our own").is_some(),
        "the new passphrase opens slot {slot}"
    );
}
