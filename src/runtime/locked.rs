//! Memory for keys: never swapped out, in no core dump, in no child process,
//! and wiped when it is given back.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use zeroize::Zeroize;

/// Bytes in pages of their own. Locking them is best effort: where
/// RLIMIT_MEMLOCK is too small for that, they are merely not dumped.
pub struct LockedBytes {
    start: NonNull<u8>,
    len: usize,
    locked: bool,
}

// SAFETY: owns its memory; nothing in it is tied to a thread.
unsafe impl Send for LockedBytes {}
// SAFETY: shared access is read-only.
unsafe impl Sync for LockedBytes {}

impl LockedBytes {
    /// `len` zeros.
    ///
    /// # Panics
    /// Where the system has no memory left.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self {
                start: NonNull::dangling(),
                len: 0,
                locked: false,
            };
        }
        // SAFETY: a new private mapping; the result is checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let start = Some(start)
            .filter(|&start| start != libc::MAP_FAILED)
            .and_then(|start| NonNull::new(start.cast::<u8>()))
            .unwrap_or_else(|| panic!("memory for a key: {}", io::Error::last_os_error()));
        // SAFETY: the mapping just made. A child that held a key would keep it
        // in memory after we have wiped ours.
        let locked = unsafe {
            libc::madvise(start.as_ptr().cast(), len, libc::MADV_DONTDUMP);
            libc::madvise(start.as_ptr().cast(), len, libc::MADV_DONTFORK);
            libc::mlock(start.as_ptr().cast(), len) == 0
        };
        Self { start, len, locked }
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }

    /// True when the memory cannot be swapped out.
    pub fn is_locked(&self) -> bool {
        self.locked
    }
}

impl Default for LockedBytes {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl Clone for LockedBytes {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl Drop for LockedBytes {
    fn drop(&mut self) {
        if self.len > 0 {
            self.zeroize();
            // SAFETY: mapped by `zeroed`, and nobody borrows it any more.
            // Unmapping unlocks.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}

impl Deref for LockedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes of ours, or none.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for LockedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl fmt::Debug for LockedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockedBytes({})", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags of the mapping at `address`: `VmFlags` of proc(5).
    fn flags(address: usize) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split(' ').next().unwrap().split_once('-');
            let bound = |text: &str| usize::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) = range.map(|(a, b)| (bound(a), bound(b))) {
                inside = (start..end).contains(&address);
            } else if let Some(flags) = line.strip_prefix("VmFlags: ").filter(|_| inside) {
                return flags.split_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("no mapping at {address:#x}");
    }

    #[test]
    fn keys_are_locked_and_neither_dumped_nor_inherited() {
        let mut key = LockedBytes::copy_of(b"a key");
        key[0] = b'A';
        assert_eq!(&*key.clone(), b"A key");
        assert!(key.is_locked());
        let flags = flags(key.as_ptr() as usize);
        for (flag, meaning) in [("lo", "locked"), ("dd", "not dumped"), ("dc", "not copied")] {
            assert!(flags.iter().any(|f| f == flag), "not {meaning}: {flags:?}");
        }
        assert!(LockedBytes::default().is_empty());
        assert_eq!(format!("{key:?}"), "LockedBytes(5)");
    }
}
