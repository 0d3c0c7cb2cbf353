//! Worker threads for computations too long for a queue thread: inflating
//! large clusters, deriving keys.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;

use super::sync::WaitList;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Pool {
    jobs: Mutex<VecDeque<Job>>,
    arrived: Condvar,
}

fn pool() -> &'static Arc<Pool> {
    static POOL: OnceLock<Arc<Pool>> = OnceLock::new();
    POOL.get_or_init(|| {
        let pool = Arc::new(Pool::default());
        let threads = thread::available_parallelism().map_or(1, |n| n.get().min(8));
        for i in 0..threads {
            let pool = Arc::clone(&pool);
            // Without a single worker `run` would never return; the process
            // cannot even start a thread then.
            thread::Builder::new()
                .name(format!("worker-{i}"))
                .spawn(move || work(&pool))
                .expect("start a worker thread");
        }
        pool
    })
}

fn work(pool: &Pool) {
    loop {
        let job = {
            let mut jobs = pool.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if let Some(job) = jobs.pop_front() {
                    break job;
                }
                jobs = pool
                    .arrived
                    .wait(jobs)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        };
        job();
    }
}

/// Runs `job` on a worker thread and waits for its result.
///
/// # Panics
/// When the job panicked.
pub async fn run<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    struct Slot<T> {
        result: Mutex<Option<thread::Result<T>>>,
        done: WaitList,
    }
    let slot = Arc::new(Slot {
        result: Mutex::new(None),
        done: WaitList::default(),
    });
    let filled = Arc::clone(&slot);
    let pool = pool();
    pool.jobs
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push_back(Box::new(move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
            *filled.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            filled.done.notify_all();
        }));
    pool.arrived.notify_one();
    let result = slot
        .done
        .wait_until(|| {
            slot.result
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take()
        })
        .await;
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
