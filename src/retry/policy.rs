//! The policy: how often, how far apart, for how long.

use std::fmt;
use std::time::Duration;

use crate::error::TaskError;
use crate::sync::Arc;

type Predicate = Arc<dyn Fn(&TaskError) -> bool + Send + Sync>;

/// When a failed task is tried again.
///
/// | | default | reason |
/// | --- | --- | --- |
/// | `max_attempts` | 8, the first one counted | with the delays below they span about two minutes |
/// | first delay | 500 ms | a restart of a peer takes about a second |
/// | growth | doubling, at most 60 s | |
/// | jitter | full: anywhere between 0 and the delay | failures come in herds, retries must not |
/// | `give_up_after` | 10 min | a database's failover fits in |
/// | a timed-out attempt | is retried | its outcome is unknown; see [`on_timeout`](Retry::on_timeout) |
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tower_defer::Retry;
///
/// let patient = Retry::exponential(12).give_up_after(Duration::from_secs(3600));
/// let steady = Retry::fixed(5, Duration::from_secs(2));
/// let once = Retry::never();
/// # let _ = (patient, steady, once);
/// ```
#[derive(Clone)]
pub struct Retry {
    max_attempts: u32,
    first_delay: Duration,
    max_delay: Duration,
    growing: bool,
    jitter: Jitter,
    give_up_after: Duration,
    on_timeout: bool,
    only_if: Option<Predicate>,
}

/// How the delay before a retry is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Jitter {
    /// Anywhere between zero and the delay.
    Full,
    /// The delay itself.
    None,
}

impl Retry {
    /// One attempt, no retry.
    #[must_use]
    pub fn never() -> Self {
        Self {
            max_attempts: 1,
            ..Self::default()
        }
    }

    /// At most `max_attempts` attempts (the first one counted; 0 counts as 1), the same delay between
    /// them, without jitter.
    #[must_use]
    pub fn fixed(max_attempts: u32, delay: Duration) -> Self {
        Self {
            max_attempts: max_attempts.max(1),
            first_delay: delay,
            max_delay: delay,
            growing: false,
            jitter: Jitter::None,
            ..Self::default()
        }
    }

    /// At most `max_attempts` attempts (the first one counted; 0 counts as 1), the delay doubling from
    /// 500 ms to 60 s, full jitter.
    #[must_use]
    pub fn exponential(max_attempts: u32) -> Self {
        Self {
            max_attempts: max_attempts.max(1),
            ..Self::default()
        }
    }

    /// The delay after the first failed attempt. Default: 500 ms.
    #[must_use]
    pub fn first_delay(mut self, delay: Duration) -> Self {
        self.first_delay = delay;
        self
    }

    /// The longest delay that growth may reach. Default: 60 s.
    #[must_use]
    pub fn max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = delay;
        self
    }

    /// How delays are spread. Default: [`Jitter::Full`], of [`fixed`](Retry::fixed) ones [`Jitter::None`].
    #[must_use]
    pub fn jitter(mut self, jitter: Jitter) -> Self {
        self.jitter = jitter;
        self
    }

    /// The time for the whole task, counted from when it was handed to the executor (for a task of a
    /// request: at the release). No retry starts after it, and a retry that runs then is ended as by
    /// its timeout. The first attempt always happens, however long it was queued, and takes no longer
    /// than this either. Default: 10 minutes.
    #[must_use]
    pub fn give_up_after(mut self, time: Duration) -> Self {
        self.give_up_after = time;
        self
    }

    /// Whether an attempt that outlived its timeout is tried again. Its outcome is unknown: it may
    /// have done its work. Default: yes.
    #[must_use]
    pub fn on_timeout(mut self, retry: bool) -> Self {
        self.on_timeout = retry;
        self
    }

    /// Retries only the errors for which `predicate` answers yes. A fatal error is never retried, and
    /// a predicate that panics ends the task as a panic of the task would. Default: all errors.
    ///
    /// # Examples
    ///
    /// ```
    /// use tower_defer::Retry;
    ///
    /// let retry = Retry::exponential(8).only_if(|error| {
    ///     error.get_ref().downcast_ref::<std::io::Error>().is_some()
    /// });
    /// # let _ = retry;
    /// ```
    #[must_use]
    pub fn only_if(
        mut self,
        predicate: impl Fn(&TaskError) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.only_if = Some(Arc::new(predicate));
        self
    }

    pub(crate) fn max_attempts(&self) -> u32 {
        self.max_attempts
    }

    pub(crate) fn age_limit(&self) -> Duration {
        self.give_up_after
    }

    pub(crate) fn retries_timeouts(&self) -> bool {
        self.on_timeout
    }

    /// Runs the user's predicate, so it may panic.
    pub(crate) fn admits(&self, error: &TaskError) -> bool {
        self.only_if
            .as_ref()
            .is_none_or(|predicate| predicate(error))
    }

    /// The delay after `attempt` failed attempts (counted from 1); `random` spreads it.
    pub(crate) fn delay(&self, attempt: u32, random: u64) -> Duration {
        let delay = if self.growing {
            let doublings = attempt.saturating_sub(1).min(63);
            let factor = u32::try_from(1_u64 << doublings.min(31)).unwrap_or(u32::MAX);
            self.first_delay.saturating_mul(factor).min(self.max_delay)
        } else {
            self.first_delay
        };
        match self.jitter {
            Jitter::None => delay,
            Jitter::Full => {
                // 32 bits of the random number are finer than any timer.
                let share = f64::from((random >> 32) as u32) / f64::from(u32::MAX);
                Duration::try_from_secs_f64(delay.as_secs_f64() * share).unwrap_or(delay)
            }
        }
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            max_attempts: 8,
            first_delay: Duration::from_millis(500),
            max_delay: Duration::from_secs(60),
            growing: true,
            jitter: Jitter::Full,
            give_up_after: Duration::from_secs(600),
            on_timeout: true,
            only_if: None,
        }
    }
}

impl fmt::Debug for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry")
            .field("max_attempts", &self.max_attempts)
            .field("first_delay", &self.first_delay)
            .field("max_delay", &self.max_delay)
            .field("jitter", &self.jitter)
            .field("give_up_after", &self.give_up_after)
            .field("on_timeout", &self.on_timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_cap_and_jitter_stays_within() {
        let plain = Retry::exponential(99).jitter(Jitter::None);
        let delays: Vec<u128> = (1..=9).map(|n| plain.delay(n, 0).as_millis()).collect();
        assert_eq!(
            delays,
            [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]
        );
        assert_eq!(plain.delay(u32::MAX, 0), Duration::from_secs(60));

        let full = Retry::exponential(99);
        assert_eq!(full.delay(3, 0), Duration::ZERO);
        assert_eq!(full.delay(3, u64::MAX), Duration::from_secs(2));
        let huge = Retry::exponential(3)
            .first_delay(Duration::MAX)
            .max_delay(Duration::MAX);
        assert_eq!(huge.jitter(Jitter::None).delay(40, 7), Duration::MAX);
    }

    #[test]
    fn full_jitter_of_an_absurd_delay_does_not_panic() {
        let huge = Retry::exponential(3)
            .first_delay(Duration::MAX)
            .max_delay(Duration::MAX);
        for random in [0, 1, u64::MAX / 2, u64::MAX] {
            let _ = huge.delay(40, random);
        }
    }
}
