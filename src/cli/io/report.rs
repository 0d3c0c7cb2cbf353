//! What was done, in qemu-io's form.

use std::fmt::Write;
use std::time::Duration;

use super::command::Manner;

/// A quantity of bytes: whole numbers without, others with three digits behind
/// the point.
pub(super) fn quantity(bytes: f64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match (value.fract() == 0.0, unit) {
        (true, _) => 0,
        (false, 0) => 6,
        (false, _) => 3,
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// The report of one operation; empty if quiet. `verb` is its past tense.
pub(super) fn operation(
    verb: &str,
    offset: u64,
    len: u64,
    took: Duration,
    manner: Manner,
) -> String {
    if manner.quiet {
        return String::new();
    }
    // Even the quickest takes a moment.
    let seconds = took.as_secs_f64().max(1e-9);
    let rate = len as f64 / seconds;
    let operations = 1.0 / seconds;
    if manner.one_line {
        let clock = clock(took, true);
        return format!("{len},1,{clock},{rate:.3},{operations:.3}\n");
    }
    format!(
        "{verb} {len}/{len} bytes at offset {offset}\n\
         {}, 1 ops; {} ({}/sec and {operations:.4} ops/sec)\n",
        quantity(len as f64),
        clock(took, false),
        quantity(rate),
    )
}

fn clock(took: Duration, full: bool) -> String {
    let seconds = took.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let hundredths = took.subsec_millis() / 10;
    if full || hours > 0 || minutes > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}.{hundredths:02}")
    } else {
        format!("{seconds:02}.{hundredths:02} sec")
    }
}

/// How much of a range is allocated.
pub(super) fn allocated(sum: u64, len: u64, offset: u64) -> String {
    format!(
        "{sum}/{len} bytes allocated at offset {}\n",
        quantity(offset as f64)
    )
}

/// A part of the disk that the image itself has, or has not.
pub(super) fn part(offset: u64, len: u64, allocated: bool) -> String {
    let not = if allocated { "   " } else { "not" };
    format!(
        "{} ({len:#x}) bytes {not} allocated at offset {} ({offset:#x})\n",
        quantity(len as f64),
        quantity(offset as f64)
    )
}

/// Bytes in rows of 16, as numbers and as letters.
pub(super) fn dump(bytes: &[u8], offset: u64) -> String {
    let mut text = String::new();
    for (row, at) in bytes.chunks(16).zip((offset..).step_by(16)) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{at:08x}:  ");
        for byte in row {
            let _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        text.extend(row.iter().map(|&byte| {
            if byte.is_ascii_alphanumeric() {
                char::from(byte)
            } else {
                '.'
            }
        }));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_have_the_known_form() {
        assert_eq!(quantity(65536.0), "64 KiB");
        assert_eq!(quantity(1e6), "976.562 KiB");
        assert_eq!(quantity(16.5), "16.500000 bytes");
        let text = operation(
            "wrote",
            4096,
            65536,
            Duration::from_millis(20),
            Manner::default(),
        );
        assert_eq!(
            text,
            "wrote 65536/65536 bytes at offset 4096\n\
             64 KiB, 1 ops; 00.02 sec (3.125 MiB/sec and 50.0000 ops/sec)\n"
        );
        let long = clock(Duration::from_millis(4_019_730), false);
        assert_eq!(long, "1:06:59.73");
        assert_eq!(
            dump(b"AB\x00z~0123456789abc", 0xff0),
            "00000ff0:  41 42 00 7a 7e 30 31 32 33 34 35 36 37 38 39 61  AB.z.0123456789a\n\
             00001000:  62 63  bc\n"
        );
    }
}
