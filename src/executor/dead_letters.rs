//! Tasks that failed for good, kept for people: to look at, to replay when the bug is fixed.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::time::{Duration, SystemTime};

use super::groups::{self, DeadLetterGroup};
use super::{Place, RejectReason, Shared};
use crate::clock;
use crate::error::panic_text;
use crate::observe;
use crate::response::ResponseInfo;
use crate::retry::DiscardReason;
use crate::sync::{Arc, Mutex};
use crate::task::{AttemptRecord, Node, TaskId};

pub(super) type Hook = Box<dyn Fn(&DeadLetter) + Send + Sync>;

/// A task that failed for good.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The task's identity; a replay keeps it.
    pub id: TaskId,
    /// The task's name.
    pub name: String,
    /// Where it was registered.
    pub location: &'static Location<'static>,
    /// Why it was discarded.
    pub reason: DiscardReason,
    /// Its last error's text, at most 1 KiB.
    pub error: Arc<str>,
    /// Its failed attempts, over all replays: the first one and the latest fifteen.
    pub history: Vec<AttemptRecord>,
    /// When it was discarded.
    pub discarded_at: SystemTime,
    /// What became of the response of the request that registered it.
    pub response: Option<ResponseInfo>,
    /// Whether it can be run again: a plain future ([`Task::once`](crate::Task::once)) that has begun
    /// cannot.
    pub replayable: bool,
}

impl DeadLetter {
    /// When its first failed attempt ended.
    pub fn first_failure(&self) -> SystemTime {
        self.history
            .first()
            .map_or(self.discarded_at, |record| record.at)
    }

    /// When its last failed attempt ended.
    pub fn last_failure(&self) -> SystemTime {
        self.history
            .last()
            .map_or(self.discarded_at, |record| record.at)
    }
}

/// The store: bounded, oldest first.
#[derive(Debug)]
pub(crate) struct Letters {
    most: usize,
    kept: Mutex<VecDeque<Kept>>,
}

#[derive(Debug)]
struct Kept {
    letter: Arc<DeadLetter>,
    /// None for a task that cannot be run again.
    node: Option<Node>,
}

impl Letters {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            kept: Mutex::new(VecDeque::new()),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.kept.lock().len()
    }

    fn list(&self) -> Vec<Arc<DeadLetter>> {
        self.kept
            .lock()
            .iter()
            .map(|kept| kept.letter.clone())
            .collect()
    }

    /// Drops all of them.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.kept.lock());
        all.into_iter().for_each(drop_kept);
    }

    fn take(&self, id: TaskId) -> Option<Kept> {
        let mut kept = self.kept.lock();
        let at = kept.iter().position(|k| k.letter.id == id)?;
        kept.remove(at)
    }

    /// Keeps one, and returns what fell out.
    fn push(&self, new: Kept) -> Option<Kept> {
        let mut kept = self.kept.lock();
        kept.push_back(new);
        if kept.len() > self.most {
            kept.pop_front()
        } else {
            None
        }
    }
}

impl Shared {
    pub(super) fn bury(&self, node: Node, reason: DiscardReason, error: Arc<str>) {
        let replayable = node.body().reusable();
        let letter = Arc::new(DeadLetter {
            id: node.id(),
            name: node.name().as_str().to_owned(),
            location: node.header().location,
            reason,
            error,
            history: node
                .settings()
                .map(|s| s.history.to_vec())
                .unwrap_or_default(),
            discarded_at: clock::wall_now(),
            response: node.response().cloned(),
            replayable,
        });
        if let Some(hook) = &self.config.on_dead_letter {
            let _within = WithinHook::enter();
            let called = catch_unwind(AssertUnwindSafe(|| hook(&letter)));
            if let Err(payload) = called {
                observe::panic_in_hook(&panic_text(payload));
            }
        }
        let node = if replayable {
            Some(node)
        } else {
            observe::panic_in_drop(node.drop_quietly());
            None
        };
        if let Some(lost) = self.letters.push(Kept { letter, node }) {
            self.counters.dead_letters_lost.add(1);
            observe::dead_letter_lost(self, &lost.letter);
            drop_kept(lost);
        }
    }
}

thread_local! {
    /// What the hook submits must not discard another task: that would call the hook, and so on through
    /// the whole queue, a frame of the stack deeper each time.
    static WITHIN_HOOK: Cell<bool> = const { Cell::new(false) };
}

struct WithinHook(bool);

impl WithinHook {
    fn enter() -> Self {
        Self(WITHIN_HOOK.replace(true))
    }
}

impl Drop for WithinHook {
    fn drop(&mut self) {
        WITHIN_HOOK.set(self.0);
    }
}

/// Whether this is the dead-letter hook's code.
pub(super) fn is_within_hook() -> bool {
    WITHIN_HOOK.get()
}

fn drop_kept(kept: Kept) {
    if let Some(node) = kept.node {
        observe::panic_in_drop(node.drop_quietly());
    }
}

/// The tasks that failed for good: at most
/// [`ExecutorBuilder::dead_letters`](crate::ExecutorBuilder::dead_letters) of them, oldest first.
///
/// # Examples
///
/// ```
/// use tower_defer::{Executor, TaskError};
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// # let executor = Executor::new();
/// executor.submit(|| async { Err::<(), _>(TaskError::fatal("user 17 has no address")) });
/// executor.idle().await;
///
/// for group in executor.dead_letters().groups() {
///     println!("{} × {}: {}", group.count, group.name, group.error);
/// }
/// // … the bug is fixed …
/// let replayed = executor.dead_letters().replay_where(|letter| letter.error.contains("address")).await;
/// assert_eq!(replayed, 1);
/// # });
/// ```
#[derive(Clone, Debug)]
pub struct DeadLetters {
    shared: Arc<Shared>,
}

/// Why a dead letter was not replayed. It stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReplayError {
    /// There is none with this id: it was replayed, discarded, or fell out.
    NotFound,
    /// It is a plain future, and has been polled: register such work as a closure.
    Spent,
    /// The executor has no room, or has been drained.
    Rejected(RejectReason),
}

impl fmt::Display for ReplayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReplayError::NotFound => f.write_str(
                "there is no dead letter with this id: it was replayed, discarded or fell out",
            ),
            ReplayError::Spent => f.write_str(
                "the task is a plain future that has been polled; register it as a closure to be \
                 able to replay it",
            ),
            ReplayError::Rejected(reason) => {
                write!(f, "the executor does not accept it: {}", reason.as_str())
            }
        }
    }
}

impl std::error::Error for ReplayError {}

impl DeadLetters {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// All of them, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<DeadLetter>> {
        self.shared.letters.list()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.letters.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// By name and error, its digits, ids and addresses blanked; the largest group first.
    #[must_use]
    pub fn groups(&self) -> Vec<DeadLetterGroup> {
        groups::group(&self.list())
    }

    /// Runs one again: as a new task with all its attempts, the same identity and its history.
    ///
    /// # Errors
    ///
    /// [`ReplayError`]; the dead letter stays.
    pub fn replay(&self, id: TaskId) -> Result<(), ReplayError> {
        let letters = self.list();
        let letter = letters
            .iter()
            .find(|l| l.id == id)
            .ok_or(ReplayError::NotFound)?;
        if !letter.replayable {
            return Err(ReplayError::Spent);
        }
        let place = self.shared.try_admit().map_err(ReplayError::Rejected)?;
        self.start(id, place).ok_or(ReplayError::NotFound)
    }

    /// Replays all that are there now and match, as room becomes free. Returns how many were replayed;
    /// those that cannot be (spent futures) stay.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the rest where it is.
    pub async fn replay_where(&self, matches: impl Fn(&DeadLetter) -> bool) -> usize {
        self.replay_paced(matches, Duration::ZERO).await
    }

    /// As [`replay_where`](Self::replay_where), at most `per_second` (at least 1) in a second: a
    /// dependency that has just come back should not be met by everything at once.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the rest where it is.
    pub async fn replay_where_at_rate(
        &self,
        per_second: u32,
        matches: impl Fn(&DeadLetter) -> bool,
    ) -> usize {
        self.replay_paced(matches, Duration::from_secs(1) / per_second.max(1))
            .await
    }

    async fn replay_paced(&self, matches: impl Fn(&DeadLetter) -> bool, pause: Duration) -> usize {
        let chosen: Vec<TaskId> = self
            .list()
            .into_iter()
            .filter(|letter| letter.replayable && matches(letter))
            .map(|letter| letter.id)
            .collect();
        let executor = super::Executor::from_shared(self.shared.clone());
        let mut replayed = 0;
        for id in chosen {
            let Ok(permit) = executor.reserve().await else {
                break;
            };
            if self.start(id, permit.into_parts().1).is_some() {
                replayed += 1;
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
        }
        replayed
    }

    /// Drops one for good. Returns whether it was there.
    pub fn discard(&self, id: TaskId) -> bool {
        self.shared.letters.take(id).map(drop_kept).is_some()
    }

    /// Drops all that match. Returns how many.
    pub fn discard_where(&self, matches: impl Fn(&DeadLetter) -> bool) -> usize {
        // Decided outside the lock: the filter is the user's code.
        let chosen: Vec<TaskId> = self
            .list()
            .iter()
            .filter(|letter| matches(letter))
            .map(|letter| letter.id)
            .collect();
        chosen.into_iter().filter(|id| self.discard(*id)).count()
    }

    fn start<H: Deref<Target = Shared>>(&self, id: TaskId, place: Place<H>) -> Option<()> {
        let mut node = self.shared.letters.take(id)?.node?;
        let settings = node.settings_mut();
        settings.attempts = 0;
        settings.last_chance = false;
        self.shared.accept(&node, place);
        self.shared.counters.replayed.add(1);
        observe::replayed(&self.shared, &node);
        self.shared.enqueue_one(node, None);
        Some(())
    }
}
