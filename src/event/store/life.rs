//! The life of one delivery, as pure decisions: every store uses these and none of its own.
//!
//! No clock, no I/O, no rows: a store reads a [`Life`], lets it decide, and writes what came out.
//!
//! Invariants:
//!
//! 1. `due_ms` is set exactly in the states `Queued` and `Retrying`; what has no due time can
//!    never be claimed.
//! 2. `generation` rises at every claim and never falls, so that a token is good for one attempt.
//! 3. `attempt` rises at a claim, falls only when that very claim is handed back, and begins anew
//!    only at a replay.
//! 4. `since_ms` is the start of the first attempt that counts: none has one without an attempt.
//! 5. `crashes` rises only for a delivery that was `Running` when its process died.

use std::fmt;

/// The reason of a dead letter whose delivery was running each time when its process died.
pub const CRASHED: &str = "crashed";

/// The reason with which a store parks a delivery whose row it can no longer trust.
pub const DAMAGED: &str = "damaged";

/// How many crashes discard a delivery: one may be the machine's, two a coincidence.
pub(crate) const CRASH_LIMIT: u32 = 3;

/// A delivery with so many crashes is a suspect: one more discards it, so a claim hands it out alone.
/// One crash alone is no ground for suspicion, since every deployment that kills the process would
/// then have all that was running done one by one.
pub const SUSPECT: u32 = CRASH_LIMIT - 1;

/// Error texts are cut to this many bytes: enough for a message and its causes, and a backtrace
/// in a loop of retries does not fill the disk.
const MAX_ERROR: usize = 4 * 1024;

/// What an unfinished delivery is doing. The names are those in the table and in the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Waits for its first attempt.
    Queued,
    /// Was claimed, and not settled yet.
    Running,
    /// Waits for another attempt.
    Retrying,
    /// Waits for code that knows it, or for a repair.
    Parked,
    /// Is a dead letter.
    Discarded,
}

impl State {
    /// All states, in the order of a delivery's life.
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Retrying,
        Self::Parked,
        Self::Discarded,
    ];

    /// The state's name, as a store writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Retrying => "retrying",
            Self::Parked => "parked",
            Self::Discarded => "discarded",
        }
    }

    /// The state with this name; `None` if there is none.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settle {
    /// The subscriber has it. The delivery leaves the hot table.
    Complete,
    /// Another attempt, not before `due_ms` (unix ms).
    Retry {
        /// When the next attempt is due (unix ms).
        due_ms: i64,
        /// The error, for the next attempt and for people.
        error: String,
    },
    /// No more attempts: it becomes a dead letter.
    Discard {
        /// Why, in one word (`exhausted`, `fatal`, `panicked`): for filters.
        reason: String,
        /// The last error.
        error: String,
    },
    /// Hand it back as if it had not been claimed: it is due at once and the attempt does not
    /// count.
    Release,
    /// Nobody here can run it (an unknown event or subscriber, a payload that does not decode).
    /// The attempt does not count.
    Park {
        /// Why, in one word: for filters.
        reason: String,
        /// What exactly is wrong.
        error: String,
    },
}

/// Where a delivery goes after a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It stays among the unfinished.
    Unfinished,
    /// It becomes a dead letter.
    Dead,
    /// It is finished and becomes history.
    Finished,
}

/// Everything that changes in the life of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) state: State,
    pub(crate) due_ms: Option<i64>,
    pub(crate) attempt: u32,
    pub(crate) generation: i64,
    pub(crate) crashes: u32,
    pub(crate) reason: Option<String>,
    pub(crate) error: Option<String>,
    pub(crate) changed_ms: i64,
    pub(crate) since_ms: Option<i64>,
}

impl Life {
    /// A delivery that may start at `due_ms`.
    pub(crate) fn queued(due_ms: i64, now_ms: i64) -> Self {
        Self {
            state: State::Queued,
            due_ms: Some(due_ms),
            attempt: 0,
            generation: 0,
            crashes: 0,
            reason: None,
            error: None,
            changed_ms: now_ms,
            since_ms: None,
        }
    }

    /// A claim: the attempt begins to count here, before anything of it runs.
    pub(crate) fn start(&mut self, now_ms: i64) {
        self.state = State::Running;
        self.due_ms = None;
        self.attempt = self.attempt.saturating_add(1);
        self.generation += 1;
        self.changed_ms = now_ms;
        self.since_ms.get_or_insert(now_ms);
    }

    /// Whether it may go into a claim beside others.
    pub(crate) fn is_suspect(&self) -> bool {
        self.crashes >= SUSPECT
    }

    /// Whether a token of this generation may settle (invariant 2).
    pub(crate) fn is_held_by(&self, generation: i64) -> bool {
        self.state == State::Running && self.generation == generation
    }

    /// The end of an attempt.
    pub(crate) fn settle(&mut self, settle: &Settle, now_ms: i64) -> Fate {
        let fate = match settle {
            Settle::Complete => Fate::Finished,
            Settle::Retry { due_ms, error } => {
                self.wait(State::Retrying, *due_ms);
                self.error = Some(cut(error));
                Fate::Unfinished
            }
            Settle::Discard { reason, error } => self.die(reason, cut(error)),
            Settle::Release => {
                // Due since it was claimed, so that it does not go behind what came later.
                self.hand_back(self.changed_ms);
                Fate::Unfinished
            }
            Settle::Park { reason, error } => {
                self.uncount();
                self.park(reason, cut(error));
                Fate::Unfinished
            }
        };
        self.changed_ms = now_ms;
        fate
    }

    /// The process died while this was running. It is due at once, by the time of its claim, so
    /// that recovery needs no clock.
    pub(crate) fn recover(&mut self, crash_limit: u32) -> Fate {
        self.crashes = self.crashes.saturating_add(1);
        if self.crashes >= crash_limit {
            let error = format!(
                "the process died {} times during this delivery",
                self.crashes
            );
            return self.die(CRASHED, error);
        }
        self.wait(State::Retrying, self.changed_ms);
        Fate::Unfinished
    }

    /// The store closes in order while this is still running: no attempt, no crash.
    pub(crate) fn hand_back(&mut self, due_ms: i64) {
        self.uncount();
        let state = if self.attempt == 0 {
            State::Queued
        } else {
            State::Retrying
        };
        self.wait(state, due_ms);
    }

    /// The attempt that was begun does not count.
    fn uncount(&mut self) {
        self.attempt = self.attempt.saturating_sub(1);
        if self.attempt == 0 {
            self.since_ms = None;
        }
    }

    /// Takes it out of the queue until somebody unparks it.
    pub(crate) fn park(&mut self, reason: &str, error: String) {
        self.state = State::Parked;
        self.due_ms = None;
        self.reason = Some(reason.to_owned());
        self.error = Some(error);
    }

    /// A new life: attempts and crashes begin anew, the last error stays readable.
    pub(crate) fn replay(&mut self, now_ms: i64) {
        self.attempt = 0;
        self.since_ms = None;
        self.crashes = 0;
        self.unpark(now_ms);
    }

    /// Back into the queue, due at once, its attempts as they were.
    pub(crate) fn unpark(&mut self, now_ms: i64) {
        let state = if self.attempt == 0 {
            State::Queued
        } else {
            State::Retrying
        };
        self.wait(state, now_ms);
        self.reason = None;
        self.changed_ms = now_ms;
    }

    fn wait(&mut self, state: State, due_ms: i64) {
        self.state = state;
        self.due_ms = Some(due_ms);
    }

    fn die(&mut self, reason: &str, error: String) -> Fate {
        self.state = State::Discarded;
        self.due_ms = None;
        self.reason = Some(reason.to_owned());
        self.error = Some(error);
        Fate::Dead
    }
}

/// The text, cut to [`MAX_ERROR`] bytes at a character's boundary.
fn cut(text: &str) -> String {
    let mut end = text.len().min(MAX_ERROR);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Life {
        let mut life = Life::queued(5, 1);
        life.start(10);
        life
    }

    #[test]
    fn a_claim_counts_the_attempt_and_renews_the_token() {
        let life = running();
        assert_eq!((life.attempt, life.generation, life.due_ms), (1, 1, None));
        assert!(life.is_held_by(1));
        assert!(!life.is_held_by(0));
    }

    #[test]
    fn a_release_costs_nothing_but_the_token() {
        let mut life = running();
        assert_eq!(life.settle(&Settle::Release, 20), Fate::Unfinished);
        assert_eq!(
            (life.state, life.attempt, life.due_ms),
            (State::Queued, 0, Some(10))
        );
        life.start(30);
        assert!(!life.is_held_by(1));
    }

    #[test]
    fn its_time_counts_from_the_first_attempt_that_counts() {
        let mut life = running();
        assert_eq!(life.since_ms, Some(10));
        let error = "e".to_owned();
        life.settle(&Settle::Retry { due_ms: 15, error }, 12);
        life.start(20);
        assert_eq!(life.since_ms, Some(10));
        life.settle(&Settle::Release, 30);
        assert_eq!((life.attempt, life.since_ms), (1, Some(10)));
        life.replay(40);
        assert_eq!(life.since_ms, None);
        life.start(50);
        life.settle(&Settle::Release, 60);
        assert_eq!(life.since_ms, None);
    }

    #[test]
    fn the_third_crash_is_the_last() {
        let mut life = running();
        for _ in 0..2 {
            assert_eq!(life.recover(3), Fate::Unfinished);
            assert_eq!(life.due_ms, Some(10));
            life.start(10);
        }
        assert_eq!(life.recover(3), Fate::Dead);
        assert_eq!(life.reason.as_deref(), Some(CRASHED));
    }

    #[test]
    fn a_replay_begins_anew_but_keeps_the_generation() {
        let mut life = running();
        life.crashes = 2;
        let fate = life.settle(
            &Settle::Discard {
                reason: "fatal".into(),
                error: "no".into(),
            },
            20,
        );
        assert_eq!(fate, Fate::Dead);
        life.replay(30);
        assert_eq!(
            (life.state, life.attempt, life.crashes),
            (State::Queued, 0, 0)
        );
        assert_eq!(
            (life.generation, life.due_ms, life.reason),
            (1, Some(30), None)
        );
        assert_eq!(life.error.as_deref(), Some("no"));
    }

    #[test]
    fn only_waiting_states_have_a_due_time() {
        let mut life = running();
        life.settle(
            &Settle::Park {
                reason: "unknown".into(),
                error: String::new(),
            },
            20,
        );
        assert_eq!(
            (life.state, life.due_ms, life.attempt),
            (State::Parked, None, 0)
        );
    }

    #[test]
    fn long_errors_are_cut_between_characters() {
        let text = "ä".repeat(MAX_ERROR);
        assert_eq!(cut(&text).len(), MAX_ERROR);
        let text = format!("x{text}");
        assert_eq!(cut(&text).len(), MAX_ERROR - 1);
    }
}
