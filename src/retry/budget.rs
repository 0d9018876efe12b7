//! The budget: how many retries an executor starts in a second.
//!
//! It delays and never discards. When a dependency of ten thousand tasks is down, they all fail
//! within a second; without a budget their retries come as one herd, and the dependency, just back,
//! falls again.

use std::time::Duration;

use crate::clock::{Tick, nanos};

/// How many retries an executor may start: `per_second` on average, `burst` at once.
///
/// A retry that finds no token waits for one; its attempt is not consumed. Default: 100 a second, 500
/// at once: ten thousand tasks that fail together come home within two minutes, well within the ten
/// of [`Retry::give_up_after`](crate::Retry::give_up_after), while a lone failure never waits.
#[derive(Clone, Copy, Debug)]
pub struct RetryBudget {
    per_second: u32,
    burst: u32,
}

impl RetryBudget {
    /// `per_second` retries on average, `burst` at once; 0 counts as 1 in both.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self {
            per_second: per_second.max(1),
            burst: burst.max(1),
        }
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::new(100, 500)
    }
}

/// A token bucket without a counter: `full_at` is when the bucket would be full again (GCRA).
#[derive(Debug)]
pub(crate) struct TokenBucket {
    interval: Duration,
    burst: Duration,
    full_at: Tick,
}

impl TokenBucket {
    pub(crate) fn new(budget: RetryBudget) -> Self {
        let interval = Duration::from_secs(1) / budget.per_second;
        let burst = Duration::from_nanos(
            nanos(interval)
                .max(1)
                .saturating_mul(u64::from(budget.burst - 1)),
        );
        Self {
            interval,
            burst,
            full_at: Tick::ZERO,
        }
    }

    /// Takes a token, or says when there will be one.
    pub(crate) fn take(&mut self, now: Tick) -> Result<(), Tick> {
        // Never later than when it is empty now: the time of a paused runtime was ahead, and has gone with it.
        let empty = now.saturating_add(self.burst).saturating_add(self.interval);
        let full_at = self.full_at.min(empty).max(now);
        if full_at.since(now) > self.burst {
            return Err(full_at.saturating_sub(self.burst));
        }
        self.full_at = full_at.saturating_add(self.interval);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = TokenBucket::new(RetryBudget::new(10, 3));
        let start = Tick::ZERO.saturating_add(Duration::from_secs(5));
        for _ in 0..3 {
            assert_eq!(bucket.take(start), Ok(()));
        }
        let mut now = start;
        for n in 1..=20 {
            let next = bucket.take(now).expect_err("the bucket is empty");
            assert_eq!(next.since(start), Duration::from_millis(100 * n));
            now = next;
            assert_eq!(bucket.take(now), Ok(()));
        }
        let later = now.saturating_add(Duration::from_secs(60));
        assert_eq!((0..9).take_while(|_| bucket.take(later).is_ok()).count(), 3);
        // The clock of the next runtime is behind.
        let next = bucket.take(start).expect_err("the bucket is empty");
        assert_eq!(next.since(start), Duration::from_millis(100));
    }
}
