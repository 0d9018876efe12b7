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
use std::time::Duration;

use http::StatusCode;

use super::Scope;
use super::gate::{Gate, Refused};
use super::sweep::Progress;
use crate::clock::Tick;
use crate::executor::{Cancel, Executor, Place, RejectReason, Shared, TaskHandle, UnfinishedState};
use crate::observe;
use crate::response::{End, ResponseInfo};
use crate::sync::{Arc, AtomicBool, OnceLock, Ordering};
use crate::task::{Fifo, Node, Origin, TaskId};

pub(crate) struct Collector {
    scope: Arc<Scope>,
    gate: Gate<Node, Beside>,
    response: OnceLock<ResponseInfo>,
    /// An inner layer with an executor of its own has seen the request.
    joined: AtomicBool,
    /// The handler has answered, and the response counts as open.
    answered: AtomicBool,
    progress: Progress,
}

/// Kept under the gate's lock.
#[derive(Debug, Default)]
struct Beside {
    first_at: Tick,
    follows: Option<tracing::span::Id>,
    place_in_sweep: Option<usize>,
    head: Option<(Head, Tick)>,
    /// From the trailers. Not a part of the ending: a release by force comes before that, and must
    /// know all the same that the call failed.
    grpc_status: Option<i32>,
    ending: Option<Ending>,
    /// Few requests have one. Boxed, so that a collector is smaller and its end has less to look at.
    elsewhere: Option<Box<Others>>,
}

#[derive(Debug, Default)]
struct Others(Vec<Elsewhere>);

/// Tasks for another executor than the layer's: an inner layer's, or one that the handler named.
#[derive(Debug)]
struct Elsewhere {
    executor: Executor,
    tasks: Fifo<Node>,
    /// As what the request counts with this executor.
    joined: Option<Stage>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Handler,
    Response,
}

/// What is known when the handler has answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) grpc_status: Option<i32>,
}

/// What is known when the response is over.
#[derive(Clone, Debug)]
pub(crate) struct Ending {
    pub(crate) end: End,
    pub(crate) bytes: u64,
    pub(crate) body_error: Option<Arc<str>>,
}

impl Ending {
    /// There is no response.
    pub(crate) fn without_response(end: End) -> Self {
        Self {
            end,
            bytes: 0,
            body_error: None,
        }
    }
}

impl Collector {
    pub(crate) fn open(scope: Arc<Scope>) -> Arc<Self> {
        scope.executor.shared().request_opened();
        Arc::new(Self {
            scope,
            gate: Gate::new(),
            response: OnceLock::new(),
            joined: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            progress: Progress::new(),
        })
    }

    pub(crate) fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
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
        self.gate.pushed() >= self.scope.max_tasks && self.response.get().is_none()
    }

    fn is_untouched(&self) -> bool {
        !self.is_used() && !self.joined.load(Ordering::Relaxed)
    }

    /// An inner layer with an executor of its own: its drain waits for this request, too.
    pub(crate) fn join(&self, executor: &Executor) {
        if Arc::ptr_eq(executor.shared(), self.scope.executor.shared()) {
            return;
        }
        self.joined.store(true, Ordering::Relaxed);
        self.gate.with(|_, beside| {
            let entry = beside.elsewhere(executor);
            if entry.joined.is_none() {
                entry.joined = Some(Stage::Handler);
                executor.shared().request_opened();
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
        let here = Arc::ptr_eq(shared, self.scope.executor.shared());
        let limit = self.scope.max_tasks;
        let mut start_sweep = false;
        let pushed = self.gate.push(
            (node, place),
            limit,
            |(mut node, place), tasks, beside, before| {
                if before == 0 {
                    start_sweep = self.first_registration(beside);
                }
                shared.accept(&mut node, place);
                if here {
                    tasks.push(node);
                } else {
                    beside.elsewhere(executor).tasks.push(node);
                }
            },
        );
        if start_sweep {
            self.scope.sweep.start(self.scope.executor.shared());
        }
        match pushed {
            Ok(()) => Ok(TaskHandle::accepted(id, self.clone())),
            Err(((node, place), Refused::Open)) => {
                self.submit(shared, node, place);
                Ok(TaskHandle::accepted(id, shared.clone()))
            }
            Err(((node, _), Refused::Limit)) => Err((node, RejectReason::RequestLimit)),
        }
    }

    /// Whether the sweep has to be started.
    fn first_registration(self: &Arc<Self>, beside: &mut Beside) -> bool {
        let shared = self.scope.executor.shared();
        shared.remember_runtime();
        beside.first_at = shared.clock.now();
        beside.follows = observe::current_span();
        let (place, start) = self.scope.sweep.add(self.clone());
        beside.place_in_sweep = Some(place);
        start
    }

    fn submit<H: Deref<Target = Shared>>(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        mut node: Node,
        place: Place<H>,
    ) {
        shared.accept(&mut node, place);
        shared.enqueue_one(node, Some(self.clone()));
    }

    /// The handler has answered. Returns whether anyone can still register a task: if not, and none
    /// is registered, the response is none of our business any more.
    pub(crate) fn head(self: &Arc<Self>, head: impl FnOnce() -> Head) -> bool {
        let used = self.is_used();
        if !used && Arc::strong_count(self) == 1 && !self.joined.load(Ordering::Relaxed) {
            return false;
        }
        let head = head();
        let now = if used {
            self.scope.executor.shared().clock.now()
        } else {
            Tick::ZERO
        };
        self.gate.with(|_, beside| {
            beside.head = Some((head, now));
            for entry in beside.others() {
                entry.move_to(Some(Stage::Response));
            }
        });
        // Relaxed: read by the one who ends the same response.
        self.answered.store(true, Ordering::Relaxed);
        self.scope.executor.shared().request_answered(true);
        self.progress.begin(self.scope.sweep.now());
        true
    }

    /// The trailers are in the server's hands, with the status of a gRPC call.
    pub(crate) fn trailers(&self, grpc_status: i32) {
        self.gate
            .with(|_, beside| beside.grpc_status = Some(grpc_status));
    }

    /// The response is over; it is released when the last chunk of it has left.
    pub(crate) fn end(&self, ending: Ending) {
        self.gate.with(|_, beside| beside.ending = Some(ending));
    }

    /// The request is over: it registers nothing any more but through clones.
    pub(crate) fn close(&self) {
        if self.joined.load(Ordering::Relaxed) {
            self.gate.with(|_, beside| {
                beside.others().for_each(|entry| entry.move_to(None));
            });
        }
        let shared = self.scope.executor.shared();
        if self.answered.load(Ordering::Relaxed) {
            shared.response_closed();
        } else {
            shared.request_answered(false);
        }
    }

    /// Releases by force what is registered so far.
    pub(crate) fn force(self: &Arc<Self>) -> usize {
        self.release(true, Shared::enqueue)
    }

    /// Gives up what a handler has registered that is still pending at a drain's deadline. It is not
    /// released: another executor, whose deadline comes a moment later, would start it meanwhile.
    pub(crate) fn abandon(self: &Arc<Self>) {
        self.release(true, |shared, tasks, _, _| {
            shared.cancel_all(tasks, UnfinishedState::NeverStarted);
        });
    }

    fn let_go(self: &Arc<Self>) {
        if self.gate.let_go() {
            self.release(false, Shared::enqueue);
        }
    }

    /// Returns how many tasks were released.
    fn release(
        self: &Arc<Self>,
        forced: bool,
        hand_over: impl Fn(&Arc<Shared>, Fifo<Node>, &Arc<dyn Origin>, Tick),
    ) -> usize {
        let clock = &self.scope.executor.shared().clock;
        let used = self.is_used();
        let now = if used { clock.now() } else { Tick::ZERO };
        let opened = self.gate.open(|beside| {
            let info = beside.response(now, forced, &self.progress);
            let end = info.end;
            // By the gate's first invariant nobody has set it before.
            let _ = self.response.set(info);
            (beside.place_in_sweep.take(), beside.take_elsewhere(), end)
        });
        let Some((tasks, (place, elsewhere, end))) = opened else {
            return 0;
        };
        if let Some(place) = place {
            self.scope.sweep.remove(place);
        }
        let count = tasks.len() + elsewhere.iter().map(|(_, t)| t.len()).sum::<usize>();
        if count == 0 {
            return 0;
        }
        observe::released(count, end);
        let origin: Arc<dyn Origin> = self.clone();
        let shared = self.scope.executor.shared();
        if !tasks.is_empty() {
            // The hint above may have missed what another thread pushed.
            let now = if used { now } else { clock.now() };
            hand_over(shared, tasks, &origin, now);
        }
        for (executor, tasks) in elsewhere {
            // Its clock is another one.
            let shared = executor.shared();
            hand_over(shared, tasks, &origin, shared.clock.now());
        }
        count
    }
}

impl Elsewhere {
    fn move_to(&mut self, stage: Option<Stage>) {
        let shared = self.executor.shared();
        match (self.joined, stage) {
            (Some(Stage::Handler), Some(Stage::Response)) => shared.request_answered(true),
            (Some(Stage::Handler), None) => shared.request_answered(false),
            (Some(Stage::Response), None) => shared.response_closed(),
            _ => return,
        }
        self.joined = stage;
    }
}

impl Beside {
    fn elsewhere(&mut self, executor: &Executor) -> &mut Elsewhere {
        let others = &mut self.elsewhere.get_or_insert_default().0;
        let found = others
            .iter()
            .position(|entry| Arc::ptr_eq(entry.executor.shared(), executor.shared()));
        let at = found.unwrap_or_else(|| {
            others.push(Elsewhere {
                executor: executor.clone(),
                tasks: Fifo::new(),
                joined: None,
            });
            others.len() - 1
        });
        &mut others[at]
    }

    fn others(&mut self) -> impl Iterator<Item = &mut Elsewhere> {
        self.elsewhere.iter_mut().flat_map(|others| &mut others.0)
    }

    /// The tasks for other executors. After a release by force the request itself goes on, and those
    /// that wait for its end are told by [`Collector::close`].
    fn take_elsewhere(&mut self) -> Vec<(Executor, Fifo<Node>)> {
        let take = |entry: &mut Elsewhere| {
            let tasks = std::mem::replace(&mut entry.tasks, Fifo::new());
            (entry.executor.clone(), tasks)
        };
        let Some(others) = &mut self.elsewhere else {
            return Vec::new();
        };
        let taken = others.0.iter_mut().map(take).collect();
        others.0.retain(|entry| entry.joined.is_some());
        taken
    }

    fn response(&mut self, now: Tick, forced: bool, progress: &Progress) -> ResponseInfo {
        let ending = self
            .ending
            .take()
            .filter(|_| !forced)
            .unwrap_or_else(|| Ending {
                end: End::Stalled,
                bytes: progress.bytes(),
                body_error: None,
            });
        let head = self.head;
        let since_first = |at: Tick| -> Duration {
            if self.first_at == Tick::ZERO {
                Duration::ZERO
            } else {
                at.since(self.first_at)
            }
        };
        ResponseInfo {
            status: head.map(|(head, _)| head.status),
            grpc_status: self
                .grpc_status
                .or(head.and_then(|(head, _)| head.grpc_status)),
            end: ending.end,
            bytes: ending.bytes,
            body_error: ending.body_error,
            to_head: head
                .filter(|(_, at)| *at != Tick::ZERO)
                .map(|(_, at)| since_first(at)),
            to_release: since_first(now),
        }
    }
}

impl Origin for Collector {
    fn response(&self) -> Option<&ResponseInfo> {
        self.response.get()
    }

    fn follows(&self) -> Option<tracing::span::Id> {
        self.gate.with(|_, beside| beside.follows.clone())
    }
}

impl Cancel for Collector {
    fn cancel(&self, id: TaskId) -> bool {
        let found = self.gate.with(|tasks, beside| {
            let is_it = |node: &Node| node.id() == id;
            if let Some(node) = tasks.remove(is_it) {
                return Some((self.scope.executor.clone(), node));
            }
            beside
                .others()
                .find_map(|entry| Some((entry.executor.clone(), entry.tasks.remove(is_it)?)))
        });
        let Some((executor, node)) = found else {
            return false;
        };
        executor.shared().cancel(node, UnfinishedState::TakenBack);
        true
    }
}

/// One holder of the collector: while there is one, nothing is released but by force.
pub(crate) struct Hold(Arc<Collector>);

impl Hold {
    /// The first one, which a new collector counts already.
    pub(crate) fn first(collector: Arc<Collector>) -> Self {
        Self(collector)
    }

    pub(crate) fn another(&self) -> Self {
        self.0.gate.hold();
        Self(self.0.clone())
    }

    pub(crate) fn collector(&self) -> &Arc<Collector> {
        &self.0
    }

    /// A sign of life: the body was asked for a frame, and said whether there is one.
    pub(crate) fn asked(&self, idle: bool) {
        self.0.progress.asked(self.0.scope.sweep.now(), idle);
    }

    /// A sign of life: a chunk has left.
    pub(crate) fn taken(&self) {
        self.0.progress.taken(self.0.scope.sweep.now());
    }

    pub(crate) fn count_bytes(&self, bytes: u64) {
        self.0.progress.count(bytes);
    }
}

impl Drop for Hold {
    #[inline]
    fn drop(&mut self) {
        // Nobody else holds it, so nothing is or will be registered, and nobody will ask for the
        // response: there is nothing to release. It saves 298 of 2,127 instructions of a request.
        if Arc::get_mut(&mut self.0).is_some_and(|collector| collector.is_untouched()) {
            return;
        }
        self.0.let_go();
    }
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector")
            .field("registered", &self.gate.pushed())
            .field("response", &self.response.get())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hold").field(&self.0).finish()
    }
}
