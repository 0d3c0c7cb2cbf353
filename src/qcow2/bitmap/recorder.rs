//! Recording: every change of the disk sets bits in all bitmaps that are
//! enabled. Knows nothing of the file.
//!
//! The bitmaps hang on a chain that only grows, so that a request walks it
//! without a lock. One that is removed stays on the chain, switched off, until
//! another of its granularity takes its place.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::bits::Bits;

/// A bitmap in memory.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) granularity_bits: u8,
    pub(super) bits: Bits,
    /// Changes of the disk are recorded.
    recording: AtomicBool,
    /// The bits are not those in the file.
    changed: AtomicBool,
}

impl Live {
    pub(super) fn new(granularity_bits: u8) -> Arc<Self> {
        Arc::new(Self {
            granularity_bits,
            bits: Bits::default(),
            recording: AtomicBool::new(false),
            changed: AtomicBool::new(false),
        })
    }

    /// Records that `len` bytes from `offset` are dirty.
    #[inline]
    pub(super) fn record(&self, offset: u64, len: u64) {
        let last = (offset + len - 1) >> self.granularity_bits;
        if self.bits.set(offset >> self.granularity_bits, last + 1) {
            self.set_changed();
        }
    }

    pub(super) fn is_recording(&self) -> bool {
        self.recording.load(Ordering::SeqCst)
    }

    pub(super) fn stop(&self) {
        self.recording.store(false, Ordering::SeqCst);
    }

    pub(super) fn is_changed(&self) -> bool {
        self.changed.load(Ordering::SeqCst)
    }

    pub(super) fn set_changed(&self) {
        self.changed.store(true, Ordering::SeqCst);
    }

    /// The bits are about to be copied to the file: what is set from now on is
    /// a change. Whether there was one.
    pub(super) fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::SeqCst)
    }
}

/// The bitmaps that requests are recorded in.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    /// Something has been recorded in; false spares the walk.
    any: AtomicBool,
    first: Link,
}

type Link = OnceLock<Box<Node>>;

#[derive(Debug)]
struct Node {
    live: Arc<Live>,
    next: Link,
}

impl Recorder {
    fn nodes(&self) -> impl Iterator<Item = &Node> {
        std::iter::successors(self.first.get(), |node| node.next.get()).map(|node| &**node)
    }

    /// Records a change of the disk. Called when the change is made, before
    /// it is acknowledged: a bitmap that is added, cleared or read meanwhile
    /// has it, or what is read from the disk after that shows it.
    #[inline]
    pub(super) fn record(&self, offset: u64, len: u64) {
        if len == 0 || !self.any.load(Ordering::Relaxed) {
            return;
        }
        for node in self.nodes() {
            if node.live.recording.load(Ordering::Relaxed) {
                node.live.record(offset, len);
            }
        }
    }

    /// Bits for a new bitmap: empty ones.
    pub(super) fn bits_for(&self, granularity_bits: u8) -> Arc<Live> {
        let left = self.nodes().map(|node| &node.live).find(|live| {
            live.granularity_bits == granularity_bits
                && !live.is_recording()
                && Arc::strong_count(live) == 1
        });
        if let Some(live) = left {
            live.bits.clear_from(0);
            live.take_changed();
            return Arc::clone(live);
        }
        Live::new(granularity_bits)
    }

    /// Records changes in `live` from now on. One caller at a time.
    pub(super) fn start(&self, live: &Arc<Live>) {
        live.recording.store(true, Ordering::SeqCst);
        self.any.store(true, Ordering::SeqCst);
        let mut link = &self.first;
        while let Some(node) = link.get() {
            if Arc::ptr_eq(&node.live, live) {
                return;
            }
            link = &node.next;
        }
        let node = Box::new(Node {
            live: Arc::clone(live),
            next: OnceLock::new(),
        });
        // Nobody else appends.
        let _ = link.set(node);
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // One after the other: a long chain would overflow the stack.
        let mut link = self.first.take();
        while let Some(mut node) = link {
            link = node.next.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_switched_on_records() {
        let recorder = Recorder::default();
        recorder.record(0, 512);
        let (a, b) = (recorder.bits_for(9), recorder.bits_for(16));
        recorder.start(&a);
        recorder.record(1, 1);
        recorder.start(&b);
        recorder.record(65535, 2);
        recorder.record(65535, 0);
        assert_eq!((a.bits.count(), b.bits.count()), (3, 2));
        a.stop();
        recorder.record(1 << 20, 1 << 20);
        assert_eq!((a.bits.count(), b.bits.count()), (3, 18));
        assert!(a.take_changed() && !a.is_changed());
    }

    #[test]
    fn a_place_left_is_taken_again() {
        let recorder = Recorder::default();
        for _ in 0..100 {
            let live = recorder.bits_for(16);
            assert_eq!(live.bits.count(), 0);
            recorder.start(&live);
            recorder.record(0, 1);
            assert!(live.is_changed());
            live.stop();
        }
        assert_eq!(recorder.nodes().count(), 1);
        let many: Vec<_> = (0..3).map(|_| recorder.bits_for(20)).collect();
        many.iter().for_each(|live| recorder.start(live));
        assert_eq!(recorder.nodes().count(), 4);
    }
}
