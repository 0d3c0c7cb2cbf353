//! Sizes as util-linux reads them (K and KiB are 1024, KB is 1000), and as
//! qemu-img shows them.

/// Reads a size in bytes: decimal, with an optional fraction and unit ("64k",
/// "1.5G", "10MB"), or hexadecimal without unit.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size such as 65536, 64K, 1.5GiB or 10MB");
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit_bytes(unit).ok_or_else(wrong)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || fraction.len() > 18 {
        return Err(wrong());
    }
    let whole: u128 = whole.parse().map_err(|_| wrong())?;
    let mut bytes = whole * u128::from(unit);
    if !fraction.is_empty() {
        // Parts of a byte do not exist.
        if unit == 1 {
            return Err(wrong());
        }
        let parts: u128 = fraction.parse().map_err(|_| wrong())?;
        bytes += parts * u128::from(unit) / 10_u128.pow(fraction.len() as u32);
    }
    u64::try_from(bytes)
        .ok()
        .filter(|&bytes| bytes <= i64::MAX as u64)
        .ok_or_else(|| format!("{text:?} is larger than 8 EiB"))
}

/// Reads a rate in bytes a second.
pub(super) fn rate(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("nothing would ever be written".to_owned()),
        bytes => Ok(bytes),
    }
}

fn unit_bytes(unit: &str) -> Option<u64> {
    let mut chars = unit.chars();
    let Some(letter) = chars.next() else {
        return Some(1);
    };
    let base: u64 = match chars.as_str() {
        "" | "iB" | "ib" => 1024,
        "B" | "b" => 1000,
        _ => return None,
    };
    if matches!(letter, 'b' | 'B') {
        return (unit.len() == 1).then_some(1);
    }
    let power = "kmgtpe".find(letter.to_ascii_lowercase())? + 1;
    Some(base.pow(power as u32))
}

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// A size for people, to three digits: "512 B", "64 KiB", "1.5 GiB".
pub(super) fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    // 1000 KiB would be four digits: it is 0.977 MiB.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match value {
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        value if value >= 1.0 => 2,
        _ => 3,
    };
    let mut digits = format!("{value:.decimals$}");
    if digits.contains('.') {
        digits.truncate(digits.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{digits} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_those_of_util_linux() {
        let cases = [
            ("0", 0),
            ("65536", 65536),
            ("0x10000", 65536),
            ("512b", 512),
            ("64k", 65536),
            ("64K", 65536),
            ("64KiB", 65536),
            ("64KB", 64000),
            ("1.5G", 3 << 29),
            ("0.5KB", 500),
            ("2T", 2 << 40),
            ("7E", 7 << 60),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "", "k", "-1", "1.5", "1.2.3k", "10 M", "10X", "10kk", "8E", "0x", "1Bi", ".5k",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn people_get_three_digits() {
        let cases = [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (65536, "64 KiB"),
            (3 << 29, "1.5 GiB"),
            (196_616, "192 KiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human(bytes), text);
        }
    }
}
