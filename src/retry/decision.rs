//! The decision after an attempt that did not succeed.

use std::time::Duration;

use super::Retry;
use crate::error::Class;

/// An attempt that did not succeed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FailedAttempt {
    /// Its number, counted from 1.
    pub(crate) attempt: u32,
    /// Since the task was handed to the executor.
    pub(crate) age: Duration,
    pub(crate) class: Class,
    /// The task was given its last chance by a drain, or its future is spent.
    pub(crate) last: bool,
    pub(crate) random: u64,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Retry(Duration),
    Discard(DiscardReason),
}

/// Why a task was discarded, and so became a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DiscardReason {
    /// It failed with [`TaskError::fatal`](crate::TaskError::fatal).
    Fatal,
    /// Its error is not among those that its [`Retry::only_if`] admits.
    NotRetryable,
    /// It failed on its last attempt.
    Attempts,
    /// The next retry would have come after [`Retry::give_up_after`].
    GaveUp,
    /// It outlived its timeout and is not to be retried then.
    TimedOut,
    /// It panicked (or its condition did).
    Panicked,
    /// [`Overflow::DropOldest`](crate::Overflow::DropOldest) made room for a newer task.
    Overflow,
}

impl DiscardReason {
    /// The name in logs and metric labels, for example `gave_up`.
    pub fn as_str(self) -> &'static str {
        match self {
            DiscardReason::Fatal => "fatal",
            DiscardReason::NotRetryable => "not_retryable",
            DiscardReason::Attempts => "attempts",
            DiscardReason::GaveUp => "gave_up",
            DiscardReason::TimedOut => "timed_out",
            DiscardReason::Panicked => "panicked",
            DiscardReason::Overflow => "overflow",
        }
    }
}

impl std::fmt::Display for DiscardReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Decides. The budget comes afterwards: it delays a retry and never forbids it.
pub(crate) fn decide(retry: &Retry, failed: FailedAttempt) -> Decision {
    let delay = match failed.class {
        Class::Panicked => return Decision::Discard(DiscardReason::Panicked),
        Class::Fatal | Class::Unreadable => return Decision::Discard(DiscardReason::Fatal),
        Class::NotRetryable => return Decision::Discard(DiscardReason::NotRetryable),
        Class::TimedOut if !retry.retries_timeouts() => {
            return Decision::Discard(DiscardReason::TimedOut);
        }
        Class::RetryAfter(delay) => delay,
        Class::Plain | Class::TimedOut => retry.delay(failed.attempt, failed.random),
    };
    if failed.last || failed.attempt >= retry.max_attempts() {
        return Decision::Discard(DiscardReason::Attempts);
    }
    // This bounds `retry_after` too: a peer that asks for ten years is not obeyed, the task gives up.
    // A retry that would start in the very moment would have no time.
    if failed.age.saturating_add(delay) >= retry.age_limit() {
        return Decision::Discard(DiscardReason::GaveUp);
    }
    Decision::Retry(delay)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table() {
        let s = Duration::from_secs;
        let retry = Retry::fixed(3, s(1)).give_up_after(s(10));
        let impatient = retry.clone().on_timeout(false);
        let at = |attempt, age, class| FailedAttempt {
            attempt,
            age: s(age),
            class,
            last: false,
            random: 0,
        };
        let discard = Decision::Discard;
        let table = [
            (&retry, at(1, 0, Class::Plain), Decision::Retry(s(1))),
            (&retry, at(2, 0, Class::Plain), Decision::Retry(s(1))),
            (
                &retry,
                at(3, 0, Class::Plain),
                discard(DiscardReason::Attempts),
            ),
            (&retry, at(1, 8, Class::Plain), Decision::Retry(s(1))),
            (
                &retry,
                at(1, 9, Class::Plain),
                discard(DiscardReason::GaveUp),
            ),
            (
                &retry,
                at(1, 0, Class::Fatal),
                discard(DiscardReason::Fatal),
            ),
            (
                &retry,
                at(1, 0, Class::NotRetryable),
                discard(DiscardReason::NotRetryable),
            ),
            (
                &retry,
                at(1, 0, Class::Panicked),
                discard(DiscardReason::Panicked),
            ),
            (
                &retry,
                at(1, 0, Class::RetryAfter(s(7))),
                Decision::Retry(s(7)),
            ),
            (
                &retry,
                at(1, 0, Class::RetryAfter(s(11))),
                discard(DiscardReason::GaveUp),
            ),
            (
                &retry,
                at(3, 0, Class::RetryAfter(s(7))),
                discard(DiscardReason::Attempts),
            ),
            (
                &retry,
                at(1, 0, Class::RetryAfter(Duration::MAX)),
                discard(DiscardReason::GaveUp),
            ),
            (&retry, at(1, 0, Class::TimedOut), Decision::Retry(s(1))),
            (
                &impatient,
                at(1, 0, Class::TimedOut),
                discard(DiscardReason::TimedOut),
            ),
            (
                &retry,
                FailedAttempt {
                    last: true,
                    ..at(1, 0, Class::Plain)
                },
                discard(DiscardReason::Attempts),
            ),
        ];
        for (retry, failed, decision) in table {
            assert_eq!(decide(retry, failed), decision, "{failed:?}");
        }
    }
}
