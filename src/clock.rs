//! The only file that reads the time or draws a random number.
//!
//! Time is tokio's, so that a paused runtime moves it; inside the crate it is a [`Tick`], eight bytes
//! instead of sixteen, because every queued task carries one.

use std::hash::{Hash, Hasher};
use std::time::{Duration, SystemTime};

const NANOS_PER_SECOND: u64 = 1_000_000_000;
const NANOS_PER_MILLI: u64 = 1_000_000;

/// Nanoseconds since the clock was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tick(u64);

impl Tick {
    pub(crate) const ZERO: Tick = Tick(0);

    pub(crate) fn since(self, earlier: Tick) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    pub(crate) fn saturating_add(self, time: Duration) -> Tick {
        Tick(self.0.saturating_add(nanos(time)))
    }

    /// The first whole millisecond that is not before it.
    pub(crate) fn ceil_millis(self) -> u64 {
        self.0.div_ceil(NANOS_PER_MILLI)
    }

    pub(crate) fn from_millis(millis: u64) -> Tick {
        Tick(millis.saturating_mul(NANOS_PER_MILLI))
    }

    /// The last whole one that is not after it.
    pub(crate) fn millis(self) -> u64 {
        self.0 / NANOS_PER_MILLI
    }

    pub(crate) fn saturating_sub(self, time: Duration) -> Tick {
        Tick(self.0.saturating_sub(nanos(time)))
    }
}

/// A duration too long for 64 bits of nanoseconds (584 years) is as good as for ever.
pub(crate) fn nanos(time: Duration) -> u64 {
    let seconds = time.as_secs().saturating_mul(NANOS_PER_SECOND);
    seconds.saturating_add(u64::from(time.subsec_nanos()))
}

/// A point of reference, and the time since then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    epoch: tokio::time::Instant,
    /// The same as a number, where instants show theirs.
    number: Option<u64>,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn new() -> Self {
        let epoch = tokio::time::Instant::now();
        Self {
            epoch,
            number: Nanos::are_shown(epoch).then(|| Nanos::of(epoch)),
        }
    }

    #[inline]
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn now(&self) -> Tick {
        self.at(tokio::time::Instant::now())
    }

    #[inline]
    fn at(&self, instant: tokio::time::Instant) -> Tick {
        match self.number {
            Some(epoch) => {
                let since = Nanos::of(instant).wrapping_sub(epoch);
                // No clock runs for 292 years: the instant is before the epoch.
                Tick(if since >> 63 == 0 { since } else { 0 })
            }
            None => Tick(nanos(instant.saturating_duration_since(self.epoch))),
        }
    }

    /// For `tokio::time::sleep_until`; a tick beyond the timer's reach is a hundred years away.
    pub(crate) fn instant(&self, tick: Tick) -> tokio::time::Instant {
        const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
        let after = Duration::from_nanos(tick.0);
        self.epoch.checked_add(after.min(FAR)).unwrap_or(self.epoch)
    }
}

/// The number behind an [`Instant`](std::time::Instant): seconds and nanoseconds, as it hands them to a
/// hasher. The difference of two instants is a `Duration`, with all the checks that it takes to make one: 38
/// of 597 instructions of a task, and three times as many of a request that defers one.
#[derive(Default)]
struct Nanos(u64);

impl Nanos {
    #[inline(always)]
    fn of(instant: tokio::time::Instant) -> u64 {
        let mut nanos = Self::default();
        instant.hash(&mut nanos);
        nanos.0
    }

    /// How an instant is hashed is nobody's promise: asked once a clock.
    fn are_shown(instant: tokio::time::Instant) -> bool {
        let number = Self::of(instant);
        [1, 999_999_999, NANOS_PER_SECOND, 12_345_678_901_234].map(|nanos| {
            let later = instant.checked_add(Duration::from_nanos(nanos));
            later.is_none_or(|later| Self::of(later).wrapping_sub(number) == nanos)
        }) == [true; 4]
    }
}

impl Hasher for Nanos {
    #[inline(always)]
    fn write_u64(&mut self, seconds: u64) {
        self.0 = self.0.wrapping_add(seconds.wrapping_mul(NANOS_PER_SECOND));
    }

    #[inline(always)]
    fn write_u32(&mut self, nanos: u32) {
        self.0 = self.0.wrapping_add(u64::from(nanos));
    }

    /// Not as it is expected: what comes of it is no time.
    fn write(&mut self, _: &[u8]) {
        self.0 = 0;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Real time, also where tokio's is paused: for the watch over threads that do not yield.
#[expect(clippy::disallowed_methods, reason = "this is the clock")]
pub(crate) fn real_now() -> std::time::Instant {
    std::time::Instant::now()
}

/// The wall clock, for records that people read. Nothing is decided by it.
#[expect(clippy::disallowed_methods, reason = "this is the clock")]
pub(crate) fn wall_now() -> SystemTime {
    SystemTime::now()
}

/// The wall clock as stores count it.
#[cfg(feature = "events")]
pub(crate) fn unix_ms(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        // Before 1970: as good as for ever due.
        Err(_) => 0,
    }
}

/// For jitter: spreads load, keeps no secret.
pub(crate) fn random() -> u64 {
    fastrand::u64(..)
}

#[cfg(all(test, not(defer_loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_the_time_since_the_clock_was_made() {
        let clock = Clock::new();
        assert!(clock.number.is_some(), "std hashes instants in another way");
        let slow = Clock {
            number: None,
            ..clock
        };
        let mut random = 7_u64;
        for bits in 0..50 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let since = Duration::from_nanos(random >> (63 - bits));
            let Some(instant) = clock.epoch.checked_add(since) else {
                continue;
            };
            assert_eq!(clock.at(instant).since(Tick::ZERO), since);
            assert_eq!(clock.at(instant), slow.at(instant));
            let before = clock.epoch.checked_sub(since).unwrap_or(clock.epoch);
            assert_eq!(
                (clock.at(before), slow.at(before)),
                (Tick::ZERO, Tick::ZERO)
            );
        }
    }
}
