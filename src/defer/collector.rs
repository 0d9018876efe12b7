//! The collector: what a request registered, held until its response is out.
//!
//! Invariants:
//! 1. The tasks are released once: when the last holder (the response's future or body, and every
//!    chunk of it that is still in the server's hands) lets go, or earlier by force.
//! 2. What became of the response is recorded before the release, under the same lock, and then never
//!    changes.
//! 3. Nothing of the user's runs here: a release only hands over.
//! 4. A request counts with its executors: as a handler until it has answered, and from then as an
//!    open response until its body ends, unless nobody is left who could register anything.

use std::ops::Deref;

use super::Scope;
use super::elsewhere::{Elsewhere, Stage};
use super::ending::{Ending, Head, Known};
use super::gate::{Gate, Refused};
use super::seen::Seen;
use super::sweep::Progress;
use crate::clock::Tick;
use crate::executor::{Cancel, Executor, Place, RejectReason, Shared, TaskHandle, UnfinishedState};
use crate::observe;
use crate::response::{BodySeen, ResponseInfo};
use crate::sync::{Arc, AtomicBool, OnceLock, Ordering};
use crate::task::{Fifo, Follows, Node, Origin, TaskId};

pub(crate) struct Collector {
    /// None in the pool.
    pub(super) scope: Option<Arc<Scope>>,
    pub(super) gate: Gate<Node, Beside>,
    /// What a user asked to see of the response: few do, and who sets it looks under the gate's lock.
    pub(super) response: OnceLock<Arc<Origin>>,
    /// An inner layer with an executor of its own has seen the request.
    pub(super) joined: AtomicBool,
    /// The handler has answered, and the response counts as open.
    pub(super) answered: AtomicBool,
    /// The request is over.
    pub(super) closed: AtomicBool,
    pub(super) progress: Progress,
    pub(super) seen: Seen,
    /// How many tasks the request may register, where that is not the scope's.
    #[cfg(feature = "test-util")]
    pub(super) limit: OnceLock<usize>,
}

/// Kept under the gate's lock.
#[derive(Debug, Default)]
pub(super) struct Beside {
    pub(super) known: Known,
    pub(super) follows: Option<Follows>,
    pub(super) place_in_sweep: Option<usize>,
    /// Set at the release.
    pub(super) origin: Option<Arc<Origin>>,
    pub(super) elsewhere: Elsewhere,
    #[cfg(feature = "events")]
    pub(super) outbox: super::outbox::Outbox,
}

impl Collector {
    pub(crate) fn scope(&self) -> &Arc<Scope> {
        match &self.scope {
            Some(scope) => scope,
            None => unreachable!("a collector has its scope while a request has it"),
        }
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What is seen of the body.
    pub(crate) fn seen(&self) -> &Seen {
        &self.seen
    }

    pub(crate) fn seen_so_far(&self) -> BodySeen {
        self.seen.so_far(self.progress.bytes())
    }

    /// A sign of life: the body was asked for a frame, and said whether there is one.
    pub(crate) fn asked(&self, idle: bool) {
        self.progress.asked(self.scope().sweep.now(), idle);
    }

    /// A sign of life: a chunk has left.
    pub(crate) fn taken(&self) {
        self.progress.taken(self.scope().sweep.now());
    }

    /// So many bytes more.
    pub(crate) fn count_bytes(&self, bytes: usize) {
        self.progress.count(bytes as u64);
    }

    pub(super) fn holders(&self) -> usize {
        self.gate.holders()
    }

    /// Whether something has been registered, as far as the caller can know.
    pub(crate) fn is_used(&self) -> bool {
        self.gate.pushed() > 0
    }

    /// Whether the request has registered all that it may. A hint: registering decides.
    pub(super) fn is_at_limit(&self) -> bool {
        self.gate.pushed() >= self.scope().max_tasks && self.origin().is_none()
    }

    /// Nothing is registered, and no other executor counts the request.
    pub(super) fn is_untouched(&self) -> bool {
        !self.is_used() && !self.joined.load(Ordering::Relaxed)
    }

    /// An inner layer with an executor of its own: its drain waits for this request, too.
    pub(crate) fn join(&self, executor: &Executor) {
        #[cfg(feature = "test-util")]
        self.listen(executor);
        if Arc::ptr_eq(executor.shared(), self.scope().executor.shared()) {
            return;
        }
        // Both ways sequentially consistent: who closes sees that somebody joins, or who joins sees that
        // it is closed.
        self.joined.store(true, Ordering::SeqCst);
        self.gate.with(|_, beside| {
            if !self.closed.load(Ordering::SeqCst) {
                beside.elsewhere.join(executor);
            }
        });
    }

    /// Takes a task in, or submits it at once if the response is out already.
    pub(crate) fn register<H: Deref<Target = Shared>>(
        self: &Arc<Self>,
        executor: &Executor,
        mut node: Node,
        place: Place<H>,
    ) -> Result<TaskHandle, (Node, RejectReason)> {
        let shared = executor.shared();
        let id = node.identify();
        observe::registered(&node);
        let here = Arc::ptr_eq(shared, self.scope().executor.shared());
        #[cfg(not(feature = "test-util"))]
        let limit = self.scope().max_tasks;
        #[cfg(feature = "test-util")]
        let limit = self.limit.get().copied().unwrap_or(self.scope().max_tasks);
        #[cfg(feature = "test-util")]
        self.listen(executor);
        if !here {
            // So that its drain finds what this request holds for it.
            self.scope().attach_to(shared);
        }
        let mut follows = observe::current_span();
        let start_sweep = match self.gate.enter(limit) {
            Ok(mut entered) => {
                let beside = entered.beside();
                let mut start_sweep = false;
                if beside.place_in_sweep.is_none() {
                    start_sweep = self.first_registration(beside, follows);
                } else if !beside.is_followed(&follows) {
                    node.settings_mut().follows = follows.take();
                }
                shared.accept(&node, place);
                if here {
                    entered.push(node);
                } else {
                    beside.elsewhere.push(executor, node);
                }
                start_sweep
            }
            Err(Refused::Open) => {
                // The response is out: the caller's span is not that of the request.
                if follows.is_some() {
                    node.settings_mut().follows = follows;
                }
                self.submit(shared, node, place);
                return Ok(TaskHandle::accepted(id, shared.clone()));
            }
            Err(Refused::Limit) => return Err((node, RejectReason::RequestLimit)),
        };
        if start_sweep {
            self.start_sweep();
        }
        Ok(TaskHandle::accepted(id, self.clone()))
    }

    #[cold]
    pub(super) fn start_sweep(&self) {
        let scope = self.scope();
        scope.sweep.start(scope.executor.shared());
    }

    /// Whether the sweep has to be started.
    pub(super) fn first_registration(
        self: &Arc<Self>,
        beside: &mut Beside,
        follows: Option<Follows>,
    ) -> bool {
        let scope = self.scope();
        let shared = scope.executor.shared();
        shared.remember_runtime();
        beside.known.first_at = shared.clock.now();
        beside.follows = follows;
        let (place, start) = scope.sweep.add(self.clone());
        beside.place_in_sweep = Some(place);
        start
    }

    fn submit<H: Deref<Target = Shared>>(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        node: Node,
        place: Place<H>,
    ) {
        shared.accept(&node, place);
        shared.enqueue_one(node, self.origin());
    }

    /// The handler has answered, and somebody has registered a task or may still do so.
    pub(crate) fn head(self: &Arc<Self>, head: impl FnOnce() -> Head) {
        let scope = self.scope();
        let shared = scope.executor.shared();
        let used = self.is_used();
        let head = head();
        let now = if used { shared.clock.now() } else { Tick::ZERO };
        self.learn(|beside| {
            beside.known.head = Some((head, now));
            beside.elsewhere.move_to(Some(Stage::Response));
        });
        // Relaxed: read by the one who ends the same response.
        self.answered.store(true, Ordering::Relaxed);
        shared.request_answered(true);
        self.progress.begin(scope.sweep.now());
    }

    /// The trailers are in the server's hands, with the status of a gRPC call.
    pub(crate) fn trailers(&self, grpc_status: i32) {
        self.gate
            .with(|_, beside| beside.known.grpc_status = Some(grpc_status));
    }

    /// The response is over, as it becomes known before the release.
    pub(crate) fn end(self: &Arc<Self>, ending: Ending) {
        self.learn(|beside| beside.known.ending = Some(ending));
    }

    /// The request is over: it registers nothing any more but through clones.
    #[inline(always)]
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        if self.joined.load(Ordering::SeqCst) {
            self.close_elsewhere();
        }
        let shared = self.scope().executor.shared();
        if self.answered.load(Ordering::Relaxed) {
            shared.response_closed();
        } else {
            shared.request_answered(false);
        }
    }

    #[cold]
    fn close_elsewhere(&self) {
        self.gate.with(|_, beside| beside.elsewhere.move_to(None));
    }

    /// What became of the response, from the release on.
    pub(crate) fn response(&self) -> Option<&ResponseInfo> {
        if self.response.get().is_none() {
            let _ = self.response.set(self.origin()?);
        }
        self.response.get().map(|origin| &origin.response)
    }

    pub(super) fn origin(&self) -> Option<Arc<Origin>> {
        self.gate.with(|_, beside| beside.origin.clone())
    }

    /// Whether this is the executor of the request's outermost layer.
    pub(super) fn is_of(&self, executor: &Shared) -> bool {
        std::ptr::eq(&**self.scope().executor.shared(), executor)
    }

    /// Gives up what is registered for an executor whose drain has come to its deadline, before the
    /// response is out. The request goes on, and with it what it holds for others.
    pub(super) fn give_up(&self, executor: &Shared) {
        let is_ours = self.is_of(executor);
        let tasks = self.gate.with(|tasks, beside| {
            if is_ours {
                std::mem::replace(tasks, Fifo::new())
            } else {
                beside.elsewhere.take_of(executor)
            }
        });
        executor.cancel_all(tasks, UnfinishedState::NeverStarted);
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn limit_to(&self, tasks: usize) {
        let _ = self.limit.set(tasks);
    }

    /// The test kit hears of this executor's tasks from now on.
    #[cfg(feature = "test-util")]
    fn listen(&self, executor: &Executor) {
        if let Some(test) = &self.scope().test {
            test.attach(executor);
        }
    }

    /// Releases now, with an end of the test's choice.
    #[cfg(feature = "test-util")]
    pub(crate) fn release_as(self: &Arc<Self>, ending: Ending) {
        self.end(ending);
        self.release_ended();
    }
}

impl Beside {
    /// As new, without writing down what is so already.
    #[inline]
    pub(super) fn renew(&mut self) {
        let Self {
            known,
            follows,
            place_in_sweep,
            origin,
            elsewhere,
            #[cfg(feature = "events")]
            outbox,
        } = self;
        known.renew();
        *place_in_sweep = None;
        if follows.is_some() {
            *follows = None;
        }
        if origin.is_some() {
            *origin = None;
        }
        if !elsewhere.is_empty() {
            *elsewhere = Elsewhere::default();
        }
        #[cfg(feature = "events")]
        if !matches!(outbox, super::outbox::Outbox::Empty) {
            *outbox = super::outbox::Outbox::Empty;
        }
    }

    /// Whether tasks of this span follow the request's first one in any case.
    fn is_followed(&self, follows: &Option<Follows>) -> bool {
        let first = self.follows.as_ref().map(|first| &first.id);
        follows
            .as_ref()
            .is_none_or(|follows| Some(&follows.id) == first)
    }
}

impl Cancel for Collector {
    fn cancel(&self, id: TaskId) -> bool {
        let found = self.gate.with(|tasks, beside| {
            let is_it = |node: &Node| node.id() == id;
            if let Some(node) = tasks.remove(is_it) {
                return Some((self.scope().executor.clone(), node));
            }
            beside.elsewhere.remove(is_it)
        });
        let Some((executor, node)) = found else {
            return false;
        };
        executor.shared().cancel(node, UnfinishedState::TakenBack);
        true
    }
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector")
            .field("registered", &self.gate.pushed())
            .field("response", &self.response())
            .finish_non_exhaustive()
    }
}
