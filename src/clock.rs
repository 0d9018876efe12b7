//! The only file that reads the time or draws a random number.
//!
//! Time is tokio's, so that a paused runtime moves it; inside the crate it is a [`Tick`], eight bytes
//! instead of sixteen, because every queued task carries one.

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
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn new() -> Self {
        Self {
            epoch: tokio::time::Instant::now(),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn now(&self) -> Tick {
        let since = tokio::time::Instant::now().saturating_duration_since(self.epoch);
        // As `nanos`, without asking for what no clock reaches: every task pays for this.
        Tick(
            since
                .as_secs()
                .wrapping_mul(NANOS_PER_SECOND)
                .wrapping_add(u64::from(since.subsec_nanos())),
        )
    }

    /// For `tokio::time::sleep_until`; a tick beyond the timer's reach is a hundred years away.
    pub(crate) fn instant(&self, tick: Tick) -> tokio::time::Instant {
        const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
        let after = Duration::from_nanos(tick.0);
        self.epoch.checked_add(after.min(FAR)).unwrap_or(self.epoch)
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
