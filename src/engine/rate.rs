//! Holding a copy back to so many bytes a second. Waits for nothing itself.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How fast is written, by all who share it.
#[derive(Debug)]
pub struct Rate {
    per_second: u64,
    /// When what has been written until now would be, at that rate.
    next: Mutex<Option<Instant>>,
}

impl Rate {
    /// At most so many bytes a second; at least one.
    pub fn new(per_second: u64) -> Self {
        Self {
            per_second: per_second.max(1),
            next: Mutex::new(None),
        }
    }

    /// How long to wait before `bytes` are written, which counts them.
    pub fn wait_for(&self, bytes: u64) -> Duration {
        self.wait_from(Instant::now(), bytes)
    }

    fn wait_from(&self, now: Instant, bytes: u64) -> Duration {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let due = next.map_or(now, |next| next.max(now));
        let takes = Duration::try_from_secs_f64(bytes as f64 / self.per_second as f64);
        // Longer than any clock reaches, nobody waits.
        *next = takes
            .ok()
            .and_then(|takes| due.checked_add(takes))
            .or(*next);
        due - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_wait_until_those_before_them_are_written() {
        let rate = Rate::new(1000);
        let begin = Instant::now();
        let wait = |after: u64, bytes| {
            let now = begin + Duration::from_millis(after);
            rate.wait_from(now, bytes).as_millis()
        };
        assert_eq!(wait(0, 500), 0);
        assert_eq!(wait(0, 1000), 500);
        assert_eq!(wait(600, 0), 900);
        // What was not used is not saved up.
        assert_eq!(wait(5000, 100), 0);
        assert_eq!(wait(5000, 100), 100);
        assert_eq!(wait(5000, u64::MAX), 200);
    }
}
