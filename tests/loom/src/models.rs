//! The models. Each panics, by itself or by loom's word, when an order exists
//! that breaks its promise: a wake-up that is lost is a deadlock to loom.

use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use crate::qcow2::grace::Grace;
use crate::runtime::inbox::{Inbox, Queued};
use crate::runtime::primitives::{Mutant, mutant};
use crate::runtime::sync::{self, WaitList};

/// Tries a model in every order in which threads are interrupted twice at most:
/// that is where bugs are, and without a bound it takes hours.
fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(model);
}

/// The eventfd, or a completion.
#[derive(Default)]
struct Event {
    count: Mutex<u32>,
    changed: Condvar,
}

impl Event {
    fn signal(&self) {
        *self.count.lock().unwrap() += 1;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.changed.wait(count).unwrap();
        }
        *count = 0;
    }
}

/// A thread that sleeps is woken for every task that others wake, once or more.
pub fn no_sleeper_is_forgotten() {
    check(|| {
        let inbox = Arc::new(Inbox::new());
        let event = Arc::new(Event::default());
        let wakers: Vec<_> = (0..2)
            .map(|task| {
                let (inbox, event) = (Arc::clone(&inbox), Arc::clone(&event));
                thread::spawn(move || {
                    if inbox.add(task) {
                        event.signal();
                    }
                })
            })
            .collect();
        let mut seen = 0;
        while seen < 2 {
            let before = seen;
            inbox.drain(|_| seen += 1);
            // As the reactor: sleeps only when there is nothing to poll.
            if seen == before && inbox.sleep() {
                event.wait();
                inbox.awake();
            }
        }
        for waker in wakers {
            waker.join().unwrap();
        }
    });
}

/// A task that is woken while it is on its way sees what it was woken for, or
/// is polled again.
pub fn no_wake_up_is_lost_on_the_way() {
    check(|| {
        let inbox = Arc::new(Inbox::new());
        let queued = Arc::new(Queued::new());
        let flag = Arc::new(AtomicBool::new(false));
        // It is on its way already, for an older reason.
        assert!(queued.set());
        let _ = inbox.add(1);
        let other = {
            let (inbox, queued, flag) = (inbox.clone(), queued.clone(), flag.clone());
            thread::spawn(move || {
                flag.store(true, Ordering::Relaxed);
                if queued.set() {
                    let _ = inbox.add(1);
                }
            })
        };
        let mut seen = false;
        let mut poll = || {
            let mut woken = 0;
            inbox.drain(|_| woken += 1);
            for _ in 0..woken {
                queued.clear();
                seen |= flag.load(Ordering::Relaxed);
            }
        };
        poll();
        other.join().unwrap();
        poll();
        assert!(seen, "what the task was woken for was not seen");
    });
}

/// One at a time is behind the lock, sees what the one before did, and all get
/// there.
pub fn the_lock_excludes_and_passes_on() {
    check(|| {
        let mutex = Arc::new(sync::Mutex::new(UnsafeCell::new(0)));
        let add = |mutex: &sync::Mutex<UnsafeCell<u32>>| {
            block_on(async {
                let guard = mutex.lock().await;
                // SAFETY: loom says so if somebody else has it.
                guard.with_mut(|value| unsafe { *value += 1 });
            });
        };
        let other = {
            let mutex = Arc::clone(&mutex);
            thread::spawn(move || add(&mutex))
        };
        add(&mutex);
        other.join().unwrap();
        let guard = mutex.try_lock().unwrap();
        // SAFETY: as above.
        assert_eq!(guard.with(|value| unsafe { *value }), 2);
    });
}

/// Whoever waits for a change hears of it, without a lock around it.
pub fn no_waiter_is_forgotten() {
    check(|| {
        let list = Arc::new(WaitList::default());
        let flag = Arc::new(AtomicBool::new(false));
        let other = {
            let (list, flag) = (Arc::clone(&list), Arc::clone(&flag));
            thread::spawn(move || {
                flag.store(true, Ordering::Relaxed);
                list.notify_all();
            })
        };
        block_on(list.wait_until(|| flag.load(Ordering::Relaxed).then_some(())));
        other.join().unwrap();
    });
}

/// One of many loads what all wait for, as slices of tables are loaded; the
/// first attempt fails.
pub fn one_loads_and_all_get_it() {
    #[derive(Clone, Copy, PartialEq)]
    enum Slot {
        Absent,
        Loading,
        Ready,
    }
    check(|| {
        let list = Arc::new(WaitList::default());
        let slot = Arc::new(Mutex::new((Slot::Absent, 0)));
        let get = |list: &WaitList, slot: &Mutex<(Slot, u32)>| loop {
            let ours = block_on(list.wait_until(|| {
                let mut slot = slot.lock().unwrap();
                match slot.0 {
                    Slot::Ready => Some(false),
                    Slot::Loading => None,
                    Slot::Absent => {
                        slot.0 = Slot::Loading;
                        Some(true)
                    }
                }
            }));
            if !ours {
                return;
            }
            let mut slot = slot.lock().unwrap();
            assert!(slot.0 == Slot::Loading, "two load at once");
            slot.1 += 1;
            slot.0 = if slot.1 == 1 {
                Slot::Absent
            } else {
                Slot::Ready
            };
            drop(slot);
            list.notify_all();
        };
        let other = {
            let (list, slot) = (Arc::clone(&list), Arc::clone(&slot));
            thread::spawn(move || get(&list, &slot))
        };
        get(&list, &slot);
        other.join().unwrap();
        assert_eq!(slot.lock().unwrap().1, 2);
    });
}

/// What a present request has found is not given to somebody else: the cell
/// stands for a host cluster, used by the request and then by its next owner.
pub fn no_cluster_is_reused_under_a_request() {
    check(|| {
        let grace = Arc::new(Grace::new(2));
        // Before any generation there is none that is earlier.
        grace.advance();
        let mapped = Arc::new(AtomicBool::new(true));
        let cluster = Arc::new(UnsafeCell::new(0));
        let request = {
            let (grace, mapped, cluster) = (grace.clone(), mapped.clone(), cluster.clone());
            thread::spawn(move || {
                let presence = block_on(grace.enter(0));
                // As a word of a slice is loaded.
                if mapped.load(Ordering::Acquire) {
                    // SAFETY: loom says so if the next owner writes meanwhile.
                    cluster.with(|value| unsafe { assert_eq!(*value, 0) });
                }
                drop(presence);
            })
        };
        mapped.store(false, Ordering::Release);
        let tag = grace.generation();
        grace.advance();
        if grace.is_over(earlier(tag)) {
            // SAFETY: as above.
            cluster.with_mut(|value| unsafe { *value = 1 });
        }
        request.join().unwrap();
    });
}

/// Who changes everything is alone, and those who waited get there, with what
/// has changed: the cell stands for all mappings. A flush may advance the
/// generation meanwhile.
pub fn a_closed_gate_excludes_and_opens_again() {
    check(|| {
        let grace = Arc::new(Grace::new(1));
        let mappings = Arc::new(UnsafeCell::new(0));
        let request = {
            let (grace, mappings) = (grace.clone(), mappings.clone());
            thread::spawn(move || {
                let presence = block_on(grace.enter(0));
                // SAFETY: loom says so if it changes meanwhile.
                mappings.with(|value| unsafe { assert!(*value < 2) });
                drop(presence);
            })
        };
        let flush = {
            let grace = grace.clone();
            thread::spawn(move || {
                grace.advance();
            })
        };
        let quiet = block_on(grace.quiet());
        // SAFETY: as above.
        mappings.with_mut(|value| unsafe { *value += 1 });
        drop(quiet);
        request.join().unwrap();
        flush.join().unwrap();
        drop(block_on(grace.quiet()));
    });
}

/// A request that is alone stays so until it has changed what it wants: the
/// cell stands for mappings that others must not know from before. Both may
/// try.
pub fn a_request_that_is_alone_stays_alone() {
    check(|| {
        let grace = Arc::new(Grace::new(2));
        let mappings = Arc::new(UnsafeCell::new(0));
        let request = |slot| {
            let (grace, mappings) = (grace.clone(), mappings.clone());
            move || {
                let presence = block_on(grace.enter(slot));
                // SAFETY: loom says so if it changes meanwhile.
                mappings.with(|value| unsafe { assert!(*value < 3) });
                if let Some(alone) = grace.alone() {
                    // SAFETY: as above.
                    mappings.with_mut(|value| unsafe { *value += 1 });
                    drop(alone);
                }
                drop(presence);
            }
        };
        let other = thread::spawn(request(1));
        request(0)();
        other.join().unwrap();
        let presence = block_on(grace.enter(0));
        assert!(grace.alone().is_some(), "nobody else is left");
        drop(presence);
    });
}

/// Free clusters of generation `tag`, or with a mutant those of the one before,
/// which are free too early then.
fn earlier(tag: u64) -> u64 {
    if mutant() == Mutant::OneGeneration {
        tag - 1
    } else {
        tag
    }
}
