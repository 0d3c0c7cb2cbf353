//! Whether two disks show the same.

use super::Source;
use crate::chain::MapEntry;
use crate::disk::blocking;
use crate::engine::is_zero;
use crate::error::Result;

/// Bytes compared at once.
const STEP: u64 = 1 << 20;
/// Differences are told by sector.
const SECTOR: u64 = 512;

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The same, or the longer one has nothing but zeros at its end.
    Same,
    /// The content differs, first in the sector at this byte.
    Content(u64),
    /// The sizes differ, and that matters.
    Size,
    /// What is stored differs in kind, first at this byte.
    Status(u64),
}

/// Compares two disks. Where one is longer, its end has to be zeros; `strict`,
/// sizes must be equal, and the same parts must be stored in the same way.
/// Whether they are in one piece makes no difference, as it does for qemu-img.
pub fn compare(
    a: &Source,
    b: &Source,
    strict: bool,
    mut progress: impl FnMut(u64, u64),
) -> Result<Verdict> {
    if strict && a.size() != b.size() {
        return Ok(Verdict::Size);
    }
    let size = a.size().max(b.size());
    let both = a.size().min(b.size());
    let (mut left, mut right) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < size {
        progress(at, size);
        let step = blocking(async {
            if at >= both {
                let longer = if a.size() > both { a } else { b };
                return rest(longer, at, &mut left).await;
            }
            let (one, other) = (
                a.extent(at, both - at).await?,
                b.extent(at, both - at).await?,
            );
            if strict && status(&one) != status(&other) {
                return Ok(Step::Found(Verdict::Status(at)));
            }
            let len = one.len.min(other.len);
            if one.zero && other.zero {
                return Ok(Step::Same(len));
            }
            let len = len.min(STEP);
            load(a, &one, at, len, &mut left).await?;
            load(b, &other, at, len, &mut right).await?;
            Ok(match left.iter().zip(&right).position(|(x, y)| x != y) {
                None => Step::Same(len),
                Some(first) => Step::Found(content(at + first as u64)),
            })
        })?;
        match step {
            Step::Same(len) => at += len,
            Step::Found(verdict) => return Ok(verdict),
        }
    }
    progress(size, size);
    Ok(Verdict::Same)
}

enum Step {
    Same(u64),
    Found(Verdict),
}

fn content(at: u64) -> Verdict {
    Verdict::Content(at / SECTOR * SECTOR)
}

/// The end of the longer disk.
async fn rest(longer: &Source, at: u64, buf: &mut Vec<u8>) -> Result<Step> {
    let entry = longer.extent(at, longer.size() - at).await?;
    if entry.zero {
        return Ok(Step::Same(entry.len));
    }
    let len = entry.len.min(STEP);
    load(longer, &entry, at, len, buf).await?;
    Ok(if is_zero(buf) {
        Step::Same(len)
    } else {
        let first = buf.iter().position(|&byte| byte != 0).unwrap_or_default();
        Step::Found(content(at + first as u64))
    })
}

async fn load(disk: &Source, entry: &MapEntry, at: u64, len: u64, buf: &mut Vec<u8>) -> Result<()> {
    buf.clear();
    buf.resize(len as usize, 0);
    if entry.zero {
        return Ok(());
    }
    disk.read(at, buf).await
}

fn status(entry: &MapEntry) -> (bool, bool, bool, bool, bool) {
    (
        entry.present,
        entry.zero,
        entry.data,
        entry.compressed,
        entry.offset.is_some(),
    )
}
