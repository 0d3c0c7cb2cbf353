//! Owned buffers, aligned for direct I/O and recycled per thread.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment of every buffer: enough for any block device's direct I/O.
pub const ALIGNMENT: usize = 4096;
/// What a thread keeps of returned buffers, in bytes.
const KEPT_BYTES: usize = 8 << 20;
/// The largest buffer worth keeping.
const KEPT_LARGEST: usize = 2 << 20;

/// An owned, aligned buffer. Dropped ones are recycled by the thread, so a
/// new one may hold **old bytes**: fill it before showing it to anybody.
pub struct Buf {
    ptr: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: a Buf owns its memory; nothing in it is tied to a thread.
unsafe impl Send for Buf {}
// SAFETY: shared access is read-only.
unsafe impl Sync for Buf {}

#[derive(Default)]
struct Kept {
    /// By power of two of the capacity, from `ALIGNMENT` up.
    classes: [Vec<NonNull<u8>>; 12],
    bytes: usize,
}

impl Drop for Kept {
    fn drop(&mut self) {
        for (class, buffers) in self.classes.iter_mut().enumerate() {
            for ptr in buffers.drain(..) {
                // SAFETY: allocated by `Buf::take` with this layout.
                unsafe { dealloc(ptr.as_ptr(), layout(ALIGNMENT << class)) };
            }
        }
    }
}

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::default();
}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity, ALIGNMENT).expect("a buffer larger than the address space")
}

fn class(capacity: usize) -> usize {
    (capacity / ALIGNMENT).trailing_zeros() as usize
}

impl Buf {
    /// A buffer of `len` bytes with unspecified content.
    pub fn take(len: usize) -> Self {
        let capacity = len.max(ALIGNMENT).next_power_of_two();
        if capacity <= KEPT_LARGEST {
            let kept = KEPT.try_with(|kept| {
                let mut kept = kept.borrow_mut();
                let ptr = kept.classes[class(capacity)].pop()?;
                kept.bytes -= capacity;
                Some(ptr)
            });
            if let Ok(Some(ptr)) = kept {
                return Self { ptr, len, capacity };
            }
        }
        // SAFETY: the layout's size is at least ALIGNMENT.
        let ptr = unsafe { alloc_zeroed(layout(capacity)) };
        let Some(ptr) = NonNull::new(ptr) else {
            handle_alloc_error(layout(capacity));
        };
        Self { ptr, len, capacity }
    }

    /// A buffer of `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        let mut buf = Self::take(len);
        buf.fill(0);
        buf
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::take(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Shortens the buffer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The start of the buffer, for a payload that outlives the borrow.
    pub(crate) fn as_raw(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if self.capacity <= KEPT_LARGEST {
            let kept = KEPT.try_with(|kept| {
                let mut kept = kept.borrow_mut();
                let keep = kept.bytes + self.capacity <= KEPT_BYTES;
                if keep {
                    kept.bytes += self.capacity;
                    kept.classes[class(self.capacity)].push(self.ptr);
                }
                keep
            });
            if kept == Ok(true) {
                return;
            }
        }
        // SAFETY: allocated by `take` with this layout, and owned by us.
        unsafe { dealloc(self.ptr.as_ptr(), layout(self.capacity)) };
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes (zeroed at allocation) that we own.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

/// Length of [`zeros`].
pub const ZEROS_LEN: usize = 1 << 20;

/// Aligned zeros to write from; never to be written to.
pub fn zeros() -> &'static [u8] {
    static ZEROS: std::sync::OnceLock<Buf> = std::sync::OnceLock::new();
    // Allocated zeroed: untouched pages cost no memory.
    ZEROS.get_or_init(|| {
        // SAFETY: non-zero size; zeroed memory is initialised.
        let ptr = unsafe { alloc_zeroed(layout(ZEROS_LEN)) };
        Buf {
            ptr: NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout(ZEROS_LEN))),
            len: ZEROS_LEN,
            capacity: ZEROS_LEN,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_recycled_and_bounded() {
        let first = Buf::take(10_000);
        assert_eq!(first.as_ptr() as usize % ALIGNMENT, 0);
        assert_eq!(first.len(), 10_000);
        let address = first.as_ptr();
        drop(first);
        let second = Buf::take(16_384);
        assert_eq!(second.as_ptr(), address);
        drop(Buf::take(64 << 20));
        assert!(Buf::zeroed(100).iter().all(|&b| b == 0));
        assert!(zeros().iter().all(|&b| b == 0));
    }
}
