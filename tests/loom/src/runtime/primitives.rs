//! Loom's primitives under the names of `src/runtime/primitives.rs`.
//!
//! Loom knows fences with SeqCst, but takes an access with SeqCst for one with
//! AcqRel. So such an access has fences around it here.

use std::cell::Cell;

pub use loom::sync::Mutex;
use loom::sync::atomic;
pub use loom::sync::atomic::Ordering;

/// A way to break the protocols, to see that the models find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// As written.
    None,
    /// SeqCst orders no more than AcqRel, and fences order nothing.
    NoTotalOrder,
    /// A flag is cleared with a store where the program swaps.
    StoreForSwap,
    /// Frees wait for one generation, where the program waits for two.
    OneGeneration,
}

thread_local! {
    static MUTANT: Cell<Mutant> = const { Cell::new(Mutant::None) };
}

/// Runs a model with a mutant. Loom's threads all run on the calling one.
pub fn with(mutant: Mutant, model: fn()) {
    MUTANT.set(mutant);
    model();
}

/// The mutant that a model runs with.
pub fn mutant() -> Mutant {
    MUTANT.get()
}

pub fn fence(ordering: Ordering) {
    if MUTANT.get() != Mutant::NoTotalOrder {
        atomic::fence(ordering);
    }
}

fn around<T>(ordering: Ordering, access: impl FnOnce() -> T) -> T {
    let total = ordering == Ordering::SeqCst;
    if total {
        fence(Ordering::SeqCst);
    }
    let value = access();
    if total {
        fence(Ordering::SeqCst);
    }
    value
}

macro_rules! atomics {
    ($($name:ident of $of:ty;)*) => {$(
        #[derive(Debug, Default)]
        pub struct $name(atomic::$name);

        impl $name {
            pub fn new(value: $of) -> Self {
                Self(atomic::$name::new(value))
            }

            pub fn load(&self, ordering: Ordering) -> $of {
                let own = if ordering == Ordering::SeqCst { Ordering::Acquire } else { ordering };
                around(ordering, || self.0.load(own))
            }

            pub fn store(&self, value: $of, ordering: Ordering) {
                let own = if ordering == Ordering::SeqCst { Ordering::Release } else { ordering };
                around(ordering, || self.0.store(value, own));
            }

            pub fn swap(&self, value: $of, ordering: Ordering) -> $of {
                if MUTANT.get() == Mutant::StoreForSwap && value == <$of>::default() {
                    let old = self.0.load(Ordering::Relaxed);
                    self.0.store(value, Ordering::Release);
                    return old;
                }
                around(ordering, || self.0.swap(value, Ordering::AcqRel))
            }

            pub fn compare_exchange(
                &self,
                old: $of,
                new: $of,
                ordering: Ordering,
                _failed: Ordering,
            ) -> Result<$of, $of> {
                around(ordering, || {
                    self.0.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
                })
            }
        }
    )*};
}

atomics! {
    AtomicBool of bool;
    AtomicU64 of u64;
}

impl AtomicU64 {
    pub fn fetch_add(&self, value: u64, ordering: Ordering) -> u64 {
        around(ordering, || self.0.fetch_add(value, Ordering::AcqRel))
    }

    pub fn fetch_sub(&self, value: u64, ordering: Ordering) -> u64 {
        around(ordering, || self.0.fetch_sub(value, Ordering::AcqRel))
    }

    pub fn fetch_or(&self, value: u64, ordering: Ordering) -> u64 {
        around(ordering, || self.0.fetch_or(value, Ordering::AcqRel))
    }
}
