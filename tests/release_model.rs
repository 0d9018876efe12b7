//! Exactly once, at the right moment: random programs of a handler, its body and its server, driven by
//! hand, against a small model.
//!
//! The model is written from the promise (the end of a response, the conditions, what is guarded, what
//! releases), not from the code, and knows nothing of holders, gates or queues. No socket, no second
//! thread: every step of a program is one call, so what has run after it is known exactly.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use proptest::prelude::*;
use proptest::test_runner::Config;
use tower::{Layer, Service};
use tower_defer::{
    Defer, DeferLayer, End, Executor, RejectReason, Task, TaskContext, TaskError, TaskHandle, When,
};

// ---- programs ----

#[derive(Clone, Debug)]
struct Program {
    method: Method,
    version: Version,
    nesting: Nesting,
    /// None: room for all.
    capacity: Option<usize>,
    max_tasks: usize,
    concurrency: usize,
    keep_clone: bool,
    handler: Handler,
    steps: Vec<Step>,
    /// How the server comes to its end when the steps are over.
    polls_to_the_end: bool,
    late: Vec<Registration>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Nesting {
    None,
    SameExecutor,
    OwnExecutor,
}

#[derive(Clone, Debug)]
struct Handler {
    in_call: Vec<Registration>,
    panics_in_call: bool,
    /// What it registers at each poll; all but the last one are pending.
    polls: Vec<Vec<Registration>>,
    answer: Answer,
}

#[derive(Clone, Debug)]
enum Answer {
    Panics,
    Error,
    Response(Reply),
}

#[derive(Clone, Debug)]
struct Reply {
    status: u16,
    grpc_status: Option<i32>,
    content_length: Option<Length>,
    exact_hint: bool,
    tells_end_of_stream: bool,
    frames: Vec<FramePlan>,
}

#[derive(Clone, Copy, Debug)]
enum Length {
    Equal,
    More,
    Less,
}

#[derive(Clone, Debug)]
struct FramePlan {
    registers: Vec<Registration>,
    kind: FrameKind,
}

#[derive(Clone, Copy, Debug)]
enum FrameKind {
    Pending,
    Data(usize),
    Trailers(Option<i32>),
    Error,
    Panics,
}

#[derive(Clone, Debug)]
struct Registration {
    how: How,
    on: On,
    when: Option<Condition>,
    ends: Ends,
}

#[derive(Clone, Copy, Debug)]
enum How {
    Run,
    TryRun,
    Permit,
    DroppedPermit,
}

#[derive(Clone, Copy, Debug)]
enum On {
    Own,
    Outer,
    Other,
}

#[derive(Clone, Copy, Debug)]
enum Condition {
    UnlessFailed,
    Success,
    Complete,
    Failure,
    Aborted,
    Always,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    Well,
    Fatally,
    Panicking,
}

#[derive(Clone, Debug)]
enum Step {
    Poll,
    Drop,
    DropChunk(usize),
    SplitChunk(usize),
    Register(Registration),
    Cancel(usize),
    /// The executor's turn.
    Run,
    /// Nothing happens for twice `max_hold`.
    Stall,
}

fn registration() -> impl Strategy<Value = Registration> {
    let how = prop_oneof![
        6 => Just(How::Run),
        2 => Just(How::TryRun),
        2 => Just(How::Permit),
        1 => Just(How::DroppedPermit),
    ];
    let on = prop_oneof![6 => Just(On::Own), 1 => Just(On::Outer), 2 => Just(On::Other)];
    let when = prop::option::weighted(
        0.7,
        prop_oneof![
            Just(Condition::UnlessFailed),
            Just(Condition::Success),
            Just(Condition::Complete),
            Just(Condition::Failure),
            Just(Condition::Aborted),
            Just(Condition::Always),
        ],
    );
    let ends =
        prop_oneof![8 => Just(Ends::Well), 1 => Just(Ends::Fatally), 1 => Just(Ends::Panicking)];
    (how, on, when, ends).prop_map(|(how, on, when, ends)| Registration {
        how,
        on,
        when,
        ends,
    })
}

fn few_registrations() -> impl Strategy<Value = Vec<Registration>> {
    prop_oneof![
        2 => Just(Vec::new()),
        2 => prop::collection::vec(registration(), 1..4),
    ]
}

fn grpc_status() -> impl Strategy<Value = Option<i32>> {
    prop_oneof![4 => Just(None), 1 => Just(Some(0)), 1 => Just(Some(13))]
}

fn reply() -> impl Strategy<Value = Reply> {
    let status = prop_oneof![
        8 => Just(200_u16),
        1 => Just(101),
        1 => Just(204),
        1 => Just(302),
        1 => Just(304),
        2 => Just(404),
        2 => Just(500),
    ];
    let length = prop::option::of(prop_oneof![
        2 => Just(Length::Equal),
        1 => Just(Length::More),
        1 => Just(Length::Less),
    ]);
    let registers = || {
        prop_oneof![
            8 => Just(Vec::new()),
            1 => prop::collection::vec(registration(), 1..3),
        ]
    };
    let inner = prop_oneof![
        2 => Just(FrameKind::Pending),
        1 => Just(FrameKind::Data(0)),
        6 => (1_usize..40).prop_map(FrameKind::Data),
    ];
    let last = prop_oneof![
        3 => grpc_status().prop_map(FrameKind::Trailers),
        1 => Just(FrameKind::Error),
        1 => Just(FrameKind::Panics),
    ];
    let frame = (registers(), inner).prop_map(|(registers, kind)| FramePlan { registers, kind });
    let last = (registers(), last).prop_map(|(registers, kind)| FramePlan { registers, kind });
    let frames = (
        prop::collection::vec(frame, 0..6),
        prop::option::weighted(0.4, last),
    )
        .prop_map(|(mut frames, last)| {
            frames.extend(last);
            frames
        });
    (
        status,
        grpc_status(),
        length,
        any::<bool>(),
        any::<bool>(),
        frames,
    )
        .prop_map(
            |(status, grpc_status, content_length, exact_hint, tells_end_of_stream, frames)| {
                Reply {
                    status,
                    grpc_status,
                    content_length,
                    exact_hint,
                    tells_end_of_stream,
                    frames,
                }
            },
        )
}

fn handler() -> impl Strategy<Value = Handler> {
    let answer = prop_oneof![
        1 => Just(Answer::Panics),
        1 => Just(Answer::Error),
        12 => reply().prop_map(Answer::Response),
    ];
    (
        few_registrations(),
        prop::bool::weighted(0.03),
        prop::collection::vec(few_registrations(), 1..4),
        answer,
    )
        .prop_map(|(in_call, panics_in_call, polls, answer)| Handler {
            in_call,
            panics_in_call,
            polls,
            answer,
        })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => Just(Step::Poll),
        1 => Just(Step::Drop),
        3 => any::<usize>().prop_map(Step::DropChunk),
        1 => any::<usize>().prop_map(Step::SplitChunk),
        3 => registration().prop_map(Step::Register),
        2 => any::<usize>().prop_map(Step::Cancel),
        2 => Just(Step::Run),
        2 => Just(Step::Stall),
    ]
}

fn program() -> impl Strategy<Value = Program> {
    let method = prop_oneof![
        8 => Just(Method::GET),
        1 => Just(Method::HEAD),
        1 => Just(Method::CONNECT),
    ];
    let version = prop_oneof![
        Just(Version::HTTP_10),
        Just(Version::HTTP_11),
        Just(Version::HTTP_2),
    ];
    let nesting = prop_oneof![
        4 => Just(Nesting::None),
        1 => Just(Nesting::SameExecutor),
        2 => Just(Nesting::OwnExecutor),
    ];
    let bounds = (
        prop::option::weighted(0.2, 1_usize..5),
        prop_oneof![4 => Just(1024_usize), 1 => 1_usize..4],
        1_usize..5,
    );
    (
        (method, version, nesting, bounds, prop::bool::weighted(0.8)),
        handler(),
        prop::collection::vec(step(), 0..24),
        any::<bool>(),
        prop::collection::vec(registration(), 0..3),
    )
        .prop_map(
            |((method, version, nesting, bounds, keep_clone), handler, steps, to_the_end, late)| {
                Program {
                    method,
                    version,
                    nesting,
                    capacity: bounds.0,
                    max_tasks: bounds.1,
                    concurrency: bounds.2,
                    keep_clone,
                    handler,
                    steps,
                    polls_to_the_end: to_the_end,
                    late,
                }
            },
        )
}

// ---- the model ----

/// The executors: the outer layer's, the inner layer's own, and one that the handler names.
const OUTER: usize = 0;
const INNER: usize = 1;
const OTHER: usize = 2;

#[derive(Debug)]
struct Model {
    http1: bool,
    head_request: bool,
    connect: bool,
    capacity: usize,
    max_tasks: usize,
    tasks: Vec<ModelTask>,
    /// Registered with the request before its release; what was taken back counts too.
    collected: usize,
    permits: [usize; 3],
    rejected_full: [u64; 3],
    rejected_limit: [u64; 3],
    started: [Vec<usize>; 3],
    stage: Stage,
    status: Option<u16>,
    head_grpc: Option<i32>,
    trailers_grpc: Option<i32>,
    declared: Option<u64>,
    bodiless: bool,
    bytes: u64,
    ended: bool,
    failed: bool,
    /// The last answer of the body to its server was "not yet".
    idle: bool,
    /// Pieces of each guarded chunk that the server still has.
    chunks: Vec<usize>,
    ending: Option<End>,
    released: Option<Info>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Handler,
    Body,
    Over,
}

#[derive(Debug)]
struct ModelTask {
    on: usize,
    when: Option<Condition>,
    ends: Ends,
    state: TaskState,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum TaskState {
    Collected,
    Queued,
    Completed,
    Skipped,
    Discarded,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq)]
struct Info {
    status: Option<u16>,
    grpc_status: Option<i32>,
    end: End,
    bytes: u64,
}

impl Info {
    fn is_failure(&self) -> bool {
        self.status.is_some_and(|status| status >= 400)
            || self.grpc_status.is_some_and(|status| status != 0)
            || self.end == End::Failed
            || self.end == End::Panicked
    }

    fn meets(&self, when: Option<Condition>) -> bool {
        let answered_well = self.status.is_some() && !self.is_failure();
        match when.unwrap_or(Condition::UnlessFailed) {
            Condition::UnlessFailed => !self.is_failure(),
            Condition::Success => answered_well,
            Condition::Complete => answered_well && self.end == End::Complete,
            Condition::Failure => self.is_failure(),
            Condition::Aborted => self.end == End::Aborted || self.end == End::Cancelled,
            Condition::Always => true,
        }
    }
}

impl Model {
    fn new(program: &Program) -> Self {
        Self {
            http1: program.version != Version::HTTP_2,
            head_request: program.method == Method::HEAD,
            connect: program.method == Method::CONNECT,
            capacity: program.capacity.unwrap_or(usize::MAX),
            max_tasks: program.max_tasks,
            tasks: Vec::new(),
            collected: 0,
            permits: [0; 3],
            rejected_full: [0; 3],
            rejected_limit: [0; 3],
            started: Default::default(),
            stage: Stage::Handler,
            status: None,
            head_grpc: None,
            trailers_grpc: None,
            declared: None,
            bodiless: false,
            bytes: 0,
            ended: false,
            failed: false,
            idle: false,
            chunks: Vec::new(),
            ending: None,
            released: None,
        }
    }

    fn outstanding(&self, on: usize) -> usize {
        let unfinished = |task: &&ModelTask| {
            task.on == on && matches!(task.state, TaskState::Collected | TaskState::Queued)
        };
        self.tasks.iter().filter(unfinished).count() + self.permits[on]
    }

    fn has_room(&self, on: usize) -> bool {
        self.outstanding(on) < self.capacity
    }

    fn is_at_limit(&self) -> bool {
        self.released.is_none() && self.collected >= self.max_tasks
    }

    /// Room is given. Whether the task is accepted; its number is the next one.
    fn register(&mut self, on: usize, when: Option<Condition>, ends: Ends) -> bool {
        let state = if self.released.is_some() {
            TaskState::Queued
        } else if self.collected < self.max_tasks {
            self.collected += 1;
            TaskState::Collected
        } else {
            return false;
        };
        self.tasks.push(ModelTask {
            on,
            when,
            ends,
            state,
        });
        true
    }

    fn cancel(&mut self, task: usize, registered_late: bool) -> bool {
        let state = &mut self.tasks[task].state;
        // A handle takes its task back from whoever it was given to: the request or the executor.
        let there = if registered_late {
            *state == TaskState::Queued
        } else {
            *state == TaskState::Collected
        };
        if there {
            *state = TaskState::Cancelled;
        }
        there
    }

    fn head(&mut self, reply: &Reply) {
        self.stage = Stage::Body;
        self.status = Some(reply.status);
        self.head_grpc = reply.grpc_status;
        self.declared = reply.declared();
        self.bodiless = self.head_request
            || [204, 304].contains(&reply.status)
            || (reply.tells_end_of_stream && reply.frames.is_empty());
    }

    fn no_response(&mut self, end: End) {
        self.stage = Stage::Over;
        self.ending = Some(end);
        self.release_if_let_go();
    }

    fn body_dropped(&mut self) {
        self.stage = Stage::Over;
        let whole = self.declared.is_some_and(|declared| self.bytes >= declared);
        let success = self.status.is_some_and(|s| (200..300).contains(&s));
        let end = if self.failed {
            End::BodyFailed
        } else if self.status == Some(101) || (self.connect && success) {
            End::Upgraded
        } else if self.bodiless {
            End::Complete
        } else if self.ended && self.declared.is_some_and(|declared| self.bytes < declared) {
            End::Truncated
        } else if self.ended || (self.http1 && whole) {
            End::Complete
        } else {
            End::Aborted
        };
        self.ending = Some(end);
        self.release_if_let_go();
    }

    fn piece_dropped(&mut self, chunk: usize) {
        self.chunks[chunk] -= 1;
        self.release_if_let_go();
    }

    fn release_if_let_go(&mut self) {
        if let Some(end) = self.ending {
            if self.chunks.iter().all(|pieces| *pieces == 0) {
                self.release(end);
            }
        }
    }

    fn release(&mut self, end: End) {
        if self.released.is_some() {
            return;
        }
        self.released = Some(Info {
            status: self.status,
            grpc_status: self.trailers_grpc.or(self.head_grpc),
            end,
            bytes: self.bytes,
        });
        for task in &mut self.tasks {
            if task.state == TaskState::Collected {
                task.state = TaskState::Queued;
            }
        }
    }

    /// Long enough for a client that takes nothing to be given up; only a request with a task is
    /// looked at.
    fn stall(&mut self) {
        let in_the_servers_hands = self.status.is_some();
        let waits_for_itself =
            self.stage == Stage::Body && self.idle && self.chunks.iter().all(|p| *p == 0);
        if self.collected > 0 && in_the_servers_hands && !waits_for_itself {
            self.release(End::Stalled);
        }
    }

    fn run(&mut self) {
        let Some(info) = &self.released else { return };
        for (number, task) in self.tasks.iter_mut().enumerate() {
            if task.state != TaskState::Queued {
                continue;
            }
            if !info.meets(task.when) {
                task.state = TaskState::Skipped;
                continue;
            }
            self.started[task.on].push(number);
            task.state = if task.ends == Ends::Well {
                TaskState::Completed
            } else {
                TaskState::Discarded
            };
        }
    }

    fn count(&self, on: usize, state: TaskState) -> u64 {
        let counted = |task: &&ModelTask| task.on == on && task.state == state;
        self.tasks.iter().filter(counted).count() as u64
    }
}

impl Reply {
    fn total(&self) -> u64 {
        let sizes = self.frames.iter().map(|frame| match frame.kind {
            FrameKind::Data(size) => size as u64,
            _ => 0,
        });
        sizes.sum()
    }

    fn header(&self) -> Option<u64> {
        self.content_length.map(|length| match length {
            Length::Equal => self.total(),
            Length::More => self.total() + 5,
            Length::Less => self.total().saturating_sub(3),
        })
    }

    fn declared(&self) -> Option<u64> {
        self.header().or(self.exact_hint.then(|| self.total()))
    }
}

// ---- the world: what the program does, told to the model as it is done ----

struct World {
    model: Mutex<Model>,
    executors: [Executor; 3],
    nesting: Nesting,
    handles: Mutex<Vec<Kept>>,
    started: Mutex<[Vec<usize>; 3]>,
    wrong: Mutex<Vec<String>>,
    /// The driver's clone of the handle.
    clone: Mutex<Option<Defer>>,
}

struct Kept {
    handle: TaskHandle,
    task: usize,
    registered_late: bool,
}

/// A failed check unwinds through drops that check too; they must not panic in their turn.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn model(&self) -> MutexGuard<'_, Model> {
        locked(&self.model)
    }

    fn wrong(&self, what: impl fmt::Display) {
        locked(&self.wrong).push(what.to_string());
    }

    fn expect<T: PartialEq + fmt::Debug>(&self, what: &str, found: T, expected: T) {
        if found != expected {
            self.wrong(format_args!(
                "{what}: found {found:?}, expected {expected:?}"
            ));
        }
    }

    fn register(self: &Arc<Self>, defer: &Defer, registration: &Registration) {
        let own = if self.nesting == Nesting::OwnExecutor {
            INNER
        } else {
            OUTER
        };
        let (on, defer) = match registration.on {
            On::Own => (own, defer.clone()),
            On::Outer => (OUTER, defer.on(&self.executors[OUTER])),
            On::Other => (OTHER, defer.on(&self.executors[OTHER])),
        };
        let mut model = self.model();
        let number = model.tasks.len();
        let task = self.task(number, on, registration);
        let has_room = model.has_room(on);
        let registered_late = model.released.is_some();
        let accept = |model: &mut Model| {
            let accepted = model.register(on, registration.when, registration.ends);
            if !accepted {
                model.rejected_limit[on] += 1;
            }
            accepted
        };
        let handle = match registration.how {
            How::Run | How::TryRun if !has_room => {
                // The request's own limit is asked first: what breaks it costs nobody else a place.
                let expected = if model.is_at_limit() {
                    model.rejected_limit[on] += 1;
                    RejectReason::RequestLimit
                } else {
                    model.rejected_full[on] += 1;
                    RejectReason::Full
                };
                drop(model);
                let reason = match registration.how {
                    How::Run => defer.run(task).rejection(),
                    _ => defer.try_run(task).err().map(|rejected| rejected.reason()),
                };
                self.expect("no room", reason, Some(expected));
                return;
            }
            How::Run => {
                let accepted = accept(&mut model);
                drop(model);
                let handle = defer.run(task);
                self.expect("run", handle.is_accepted(), accepted);
                handle.is_accepted().then_some(handle)
            }
            How::TryRun => {
                let accepted = accept(&mut model);
                drop(model);
                let handle = defer.try_run(task);
                self.expect("try_run", handle.is_ok(), accepted);
                handle.ok()
            }
            How::Permit | How::DroppedPermit => {
                drop(model);
                let mut reserve = std::pin::pin!(defer.reserve());
                let mut cx = Context::from_waker(Waker::noop());
                let polled = reserve.as_mut().poll(&mut cx);
                self.expect("reserve", polled.is_ready(), has_room);
                let Poll::Ready(permit) = polled else { return };
                let permit = permit.expect("nobody has drained");
                if matches!(registration.how, How::DroppedPermit) {
                    return;
                }
                let accepted = accept(&mut self.model());
                let handle = permit.run(task);
                self.expect("permit", handle.is_ok(), accepted);
                handle.ok()
            }
        };
        if let Some(handle) = handle {
            locked(&self.handles).push(Kept {
                handle,
                task: number,
                registered_late,
            });
        }
    }

    fn task(self: &Arc<Self>, number: usize, on: usize, registration: &Registration) -> Task {
        let (world, ends) = (self.clone(), registration.ends);
        let task = Task::with_context(move |context: TaskContext| {
            let world = world.clone();
            async move {
                world.task_started(number, on, &context);
                match ends {
                    Ends::Well => Ok(()),
                    Ends::Fatally => Err(TaskError::fatal("as planned")),
                    // The hook that prints panics is not called.
                    Ends::Panicking => resume_unwind(Box::new("as planned")),
                }
            }
        });
        match registration.when {
            None => task,
            Some(Condition::UnlessFailed) => task.when(When::unless_failed()),
            Some(Condition::Success) => task.when(When::success()),
            Some(Condition::Complete) => task.when(When::complete()),
            Some(Condition::Failure) => task.when(When::failure()),
            Some(Condition::Aborted) => task.when(When::aborted()),
            Some(Condition::Always) => task.when(When::always()),
        }
    }

    fn task_started(&self, number: usize, on: usize, context: &TaskContext) {
        locked(&self.started)[on].push(number);
        let seen = context.response().map(info);
        let released = self.model().released.clone();
        self.expect("the response that a task sees", seen, released);
    }

    /// After every step: nothing has run that should not have, and everything that should.
    fn check(&self, step: &dyn fmt::Debug) {
        let model = self.model();
        let started = locked(&self.started);
        let mut wrong = Vec::new();
        if *started != model.started {
            wrong.push(format!("started {started:?}, expected {:?}", model.started));
        }
        if let Some(defer) = &*locked(&self.clone) {
            let found = defer.response().map(info);
            if found != model.released {
                wrong.push(format!("released {found:?}, expected {:?}", model.released));
            }
        }
        drop(started);
        drop(model);
        for what in wrong {
            self.wrong(format_args!("after {step:?}: {what}"));
        }
        let wrong = locked(&self.wrong);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    fn check_counters(&self) {
        let model = self.model();
        for (on, executor) in self.executors.iter().enumerate() {
            let found = executor.snapshot();
            let expected = [
                model.count(on, TaskState::Completed),
                model.count(on, TaskState::Skipped),
                model.count(on, TaskState::Discarded),
                model.count(on, TaskState::Cancelled),
                model.rejected_full[on],
                model.rejected_limit[on],
            ];
            let counted = [
                found.completed,
                found.skipped,
                found.discarded,
                found.cancelled,
                found.rejected_full,
                found.rejected_request_limit,
            ];
            assert_eq!(
                counted, expected,
                "executor {on}: completed, skipped, discarded, cancelled, rejected (full, limit)"
            );
            assert_eq!(
                found.accepted,
                expected[..4].iter().sum::<u64>(),
                "executor {on}: {found:?}"
            );
            let left = [
                found.outstanding,
                found.collected,
                found.queued,
                found.waiting,
                found.running.len() as u64,
                found.reserved,
                found.open_requests,
            ];
            assert_eq!(left, [0; 7], "executor {on} is quiet: {found:?}");
        }
    }
}

fn info(info: &tower_defer::ResponseInfo) -> Info {
    Info {
        status: info.status.map(|status| status.as_u16()),
        grpc_status: info.grpc_status,
        end: info.end,
        bytes: info.bytes,
    }
}

// ---- the service that does as the program says ----

#[derive(Clone)]
struct Scripted {
    world: Arc<World>,
    handler: Handler,
    keep_clone: bool,
}

struct ScriptedFuture {
    world: Arc<World>,
    /// None once it has answered.
    defer: Option<Defer>,
    /// Asked for its state only, so it is no reason to keep watching the response.
    polls: VecDeque<Vec<Registration>>,
    answer: Answer,
}

#[derive(Debug, PartialEq)]
struct Planned;

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("as planned")
    }
}

impl<B> Service<Request<B>> for Scripted {
    type Response = Response<ScriptedBody>;
    type Error = Planned;
    type Future = ScriptedFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Planned>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ScriptedFuture {
        let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
        for registration in &self.handler.in_call {
            self.world.register(&defer, registration);
        }
        if self.keep_clone {
            *locked(&self.world.clone) = Some(defer.clone());
        }
        if self.handler.panics_in_call {
            resume_unwind(Box::new("as planned"));
        }
        ScriptedFuture {
            world: self.world.clone(),
            defer: Some(defer),
            polls: self.handler.polls.clone().into(),
            answer: self.handler.answer.clone(),
        }
    }
}

impl Future for ScriptedFuture {
    type Output = Result<Response<ScriptedBody>, Planned>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let defer = this
            .defer
            .take()
            .expect("polled once more after it was ready");
        for registration in this.polls.pop_front().into_iter().flatten() {
            this.world.register(&defer, &registration);
        }
        if !this.polls.is_empty() {
            this.defer = Some(defer);
            return Poll::Pending;
        }
        match &this.answer {
            Answer::Panics => {
                this.defer = Some(defer);
                resume_unwind(Box::new("as planned"))
            }
            Answer::Error => Poll::Ready(Err(Planned)),
            Answer::Response(reply) => {
                let mut response = Response::builder().status(reply.status);
                if let Some(length) = reply.header() {
                    response = response.header("content-length", length);
                }
                if let Some(status) = reply.grpc_status {
                    response = response.header("grpc-status", status);
                }
                let registers = reply.frames.iter().any(|f| !f.registers.is_empty());
                let body = ScriptedBody {
                    world: this.world.clone(),
                    defer: registers.then_some(defer),
                    frames: reply.frames.clone().into(),
                    left: reply.total(),
                    exact_hint: reply.exact_hint,
                    tells_end_of_stream: reply.tells_end_of_stream,
                };
                Poll::Ready(Ok(response.body(body).expect("a valid head")))
            }
        }
    }
}

impl Drop for ScriptedFuture {
    /// The handler's own things are free before anything is released.
    fn drop(&mut self) {
        if let Some(defer) = &self.defer {
            self.world.expect(
                "no release before the handler is gone",
                defer.response().is_none(),
                true,
            );
        }
    }
}

struct ScriptedBody {
    world: Arc<World>,
    defer: Option<Defer>,
    frames: VecDeque<FramePlan>,
    left: u64,
    exact_hint: bool,
    tells_end_of_stream: bool,
}

impl Body for ScriptedBody {
    type Data = Bytes;
    type Error = Planned;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Planned>>> {
        let this = &mut *self;
        let Some(frame) = this.frames.pop_front() else {
            return Poll::Ready(None);
        };
        if let Some(defer) = &this.defer {
            for registration in &frame.registers {
                this.world.register(defer, registration);
            }
        }
        match frame.kind {
            FrameKind::Pending => Poll::Pending,
            FrameKind::Data(size) => {
                this.left -= size as u64;
                Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![7; size])))))
            }
            FrameKind::Trailers(status) => {
                let mut trailers = HeaderMap::new();
                if let Some(status) = status {
                    trailers.insert("grpc-status", status.into());
                }
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            FrameKind::Error => Poll::Ready(Some(Err(Planned))),
            FrameKind::Panics => resume_unwind(Box::new("as planned")),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.tells_end_of_stream && self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        if self.exact_hint {
            SizeHint::with_exact(self.left)
        } else {
            SizeHint::default()
        }
    }
}

impl Drop for ScriptedBody {
    /// By the time of a release that nobody forced, the inner body is gone.
    fn drop(&mut self) {
        let stalled = self.world.model().released.is_some();
        if let Some(defer) = locked(&self.world.clone).as_ref() {
            self.world.expect(
                "released while the body is there",
                defer.response().is_some(),
                stalled,
            );
        }
    }
}

// ---- the server, by hand ----

enum Server<F, B> {
    Calls(Pin<Box<F>>),
    Sends(Pin<Box<B>>),
    Done,
}

struct Piece {
    bytes: Bytes,
    /// None for a chunk that carries no guard.
    chunk: Option<usize>,
}

async fn turn_of_the_executor() {
    // The clock moves only when nothing else can.
    tokio::time::sleep(Duration::from_millis(1)).await; // paused time
}

async fn follow(program: Program) {
    let executor = || {
        Executor::builder()
            .concurrency(program.concurrency)
            .capacity(program.capacity.unwrap_or(10_000))
            .build()
    };
    let world = Arc::new(World {
        model: Mutex::new(Model::new(&program)),
        executors: [executor(), executor(), executor()],
        nesting: program.nesting,
        handles: Mutex::default(),
        started: Mutex::default(),
        wrong: Mutex::default(),
        clone: Mutex::default(),
    });
    let layer = DeferLayer::new()
        .executor(world.executors[OUTER].clone())
        .max_tasks_per_request(program.max_tasks)
        .max_hold(MAX_HOLD);
    let scripted = Scripted {
        world: world.clone(),
        handler: program.handler.clone(),
        keep_clone: program.keep_clone,
    };
    let request = Request::builder()
        .method(program.method.clone())
        .version(program.version)
        .body(())
        .expect("a valid request");
    match program.nesting {
        Nesting::None => drive(&program, &world, layer.layer(scripted), request).await,
        Nesting::SameExecutor => {
            let inner = DeferLayer::new().executor(world.executors[OUTER].clone());
            drive(
                &program,
                &world,
                layer.layer(inner.layer(scripted)),
                request,
            )
            .await;
        }
        Nesting::OwnExecutor => {
            let inner = DeferLayer::new().executor(world.executors[INNER].clone());
            drive(
                &program,
                &world,
                layer.layer(inner.layer(scripted)),
                request,
            )
            .await;
        }
    }
    drop(layer);

    for registration in &program.late {
        let clone = locked(&world.clone).clone();
        if let Some(defer) = clone {
            world.register(&defer, registration);
            world.check(&("late", registration));
        }
    }
    turn_of_the_executor().await;
    world.model().run();
    world.check(&"the end");
    world.check_counters();
    for executor in &world.executors {
        let report = executor.drain(Duration::from_secs(1)).await;
        assert!(!report.timed_out, "a drain of a quiet executor: {report}");
    }
}

const MAX_HOLD: Duration = Duration::from_secs(4);

async fn drive<S, B>(program: &Program, world: &Arc<World>, mut service: S, request: Request<()>)
where
    S: Service<Request<()>, Response = Response<B>, Error = Planned>,
    B: Body<Data = Bytes, Error = Planned>,
{
    let called = catch_unwind(AssertUnwindSafe(|| service.call(request)));
    let mut server = match called {
        Ok(future) => Server::Calls(Box::pin(future)),
        Err(_) => {
            world.model().no_response(End::Panicked);
            Server::Done
        }
    };
    world.check(&"the call");
    let mut pieces: Vec<Piece> = Vec::new();
    for step in &program.steps {
        match step {
            Step::Poll => server = poll(server, world, &mut pieces, &program.handler),
            Step::Drop => server = hang_up(server, world),
            Step::DropChunk(at) => drop_piece(world, &mut pieces, *at),
            Step::SplitChunk(at) => split_piece(world, &mut pieces, *at),
            Step::Register(registration) => {
                let clone = locked(&world.clone).clone();
                if let Some(defer) = clone {
                    world.register(&defer, registration);
                }
            }
            Step::Cancel(at) => cancel(world, *at),
            Step::Run => {
                turn_of_the_executor().await;
                world.model().run();
            }
            Step::Stall => {
                world.model().stall();
                tokio::time::sleep(2 * MAX_HOLD).await; // paused time
                world.model().run();
            }
        }
        world.check(step);
    }
    while program.polls_to_the_end && !matches!(server, Server::Done) {
        let before = world.model().ended;
        server = poll(server, world, &mut pieces, &program.handler);
        world.check(&"a poll to the end");
        if before {
            // Also once more after its end: some layers do.
            break;
        }
    }
    drop(hang_up(server, world));
    world.check(&"hanging up");
    turn_of_the_executor().await;
    world.model().run();
    world.check(&"a turn after hanging up");
    while !pieces.is_empty() {
        drop_piece(world, &mut pieces, program.steps.len());
        world.check(&"the last pieces");
    }
}

fn poll<F, B>(
    server: Server<F, B>,
    world: &Arc<World>,
    pieces: &mut Vec<Piece>,
    handler: &Handler,
) -> Server<F, B>
where
    F: Future<Output = Result<Response<B>, Planned>>,
    B: Body<Data = Bytes, Error = Planned>,
{
    let mut cx = Context::from_waker(Waker::noop());
    match server {
        Server::Done => Server::Done,
        Server::Calls(mut future) => {
            let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut cx)));
            match polled {
                Ok(Poll::Pending) => Server::Calls(future),
                Ok(Poll::Ready(Ok(response))) => {
                    if let Answer::Response(reply) = &handler.answer {
                        world.model().head(reply);
                        world.expect(
                            "the status",
                            response.status(),
                            StatusCode::from_u16(reply.status).expect("valid"),
                        );
                    }
                    Server::Sends(Box::pin(response.into_body()))
                }
                Ok(Poll::Ready(Err(Planned))) => {
                    world.model().no_response(End::Failed);
                    Server::Done
                }
                Err(_) => {
                    drop(future);
                    world.model().no_response(End::Panicked);
                    Server::Done
                }
            }
        }
        Server::Sends(mut body) => {
            let polled = catch_unwind(AssertUnwindSafe(|| body.as_mut().poll_frame(&mut cx)));
            let at_end = body.is_end_stream();
            let mut model = world.model();
            model.idle = matches!(polled, Ok(Poll::Pending));
            match polled {
                Ok(Poll::Pending) => {}
                Ok(Poll::Ready(None)) => model.ended = true,
                Ok(Poll::Ready(Some(Err(Planned)))) => model.failed = true,
                Ok(Poll::Ready(Some(Ok(frame)))) => {
                    model.ended |= at_end;
                    match frame.into_data() {
                        Ok(bytes) => {
                            model.bytes += bytes.len() as u64;
                            let guarded = model.collected > 0 && model.released.is_none();
                            let chunk = (guarded && !bytes.is_empty()).then(|| {
                                model.chunks.push(1);
                                model.chunks.len() - 1
                            });
                            pieces.push(Piece { bytes, chunk });
                        }
                        Err(frame) => {
                            let trailers = frame.into_trailers().expect("data or trailers");
                            model.ended = true;
                            model.trailers_grpc = trailers
                                .get("grpc-status")
                                .map(|v| v.to_str().expect("text").parse().expect("a number"));
                        }
                    }
                }
                Err(_) => {
                    model.failed = true;
                    drop(model);
                    return hang_up(Server::<F, B>::Sends(body), world);
                }
            }
            Server::Sends(body)
        }
    }
}

/// The server lets go of the future or of the body.
fn hang_up<F, B>(server: Server<F, B>, world: &Arc<World>) -> Server<F, B> {
    match server {
        Server::Calls(future) => {
            drop(future);
            world.model().no_response(End::Cancelled);
        }
        Server::Sends(body) => {
            drop(body);
            world.model().body_dropped();
        }
        Server::Done => {}
    }
    Server::Done
}

fn drop_piece(world: &World, pieces: &mut Vec<Piece>, at: usize) {
    if pieces.is_empty() {
        return;
    }
    let piece = pieces.swap_remove(at % pieces.len());
    drop(piece.bytes);
    if let Some(chunk) = piece.chunk {
        world.model().piece_dropped(chunk);
    }
}

fn split_piece(world: &World, pieces: &mut Vec<Piece>, at: usize) {
    if pieces.is_empty() {
        return;
    }
    let at = at % pieces.len();
    let half = pieces[at].bytes.len() / 2;
    if half == 0 {
        return;
    }
    let bytes = pieces[at].bytes.split_to(half);
    let chunk = pieces[at].chunk;
    if let Some(chunk) = chunk {
        world.model().chunks[chunk] += 1;
    }
    pieces.push(Piece { bytes, chunk });
}

fn cancel(world: &World, at: usize) {
    let handles = locked(&world.handles);
    if handles.is_empty() {
        return;
    }
    let kept = &handles[at % handles.len()];
    let expected = world.model().cancel(kept.task, kept.registered_late);
    world.expect("cancel", kept.handle.cancel(), expected);
}

/// A few seconds' worth, or as many as `RELEASE_MODEL_CASES` says.
fn cases() -> u32 {
    let asked = std::env::var("RELEASE_MODEL_CASES").ok();
    asked.and_then(|cases| cases.parse().ok()).unwrap_or(2_500)
}

proptest! {
    #![proptest_config(Config {
        cases: cases(),
        // The input that fails is printed, as a program.
        failure_persistence: None,
        ..Config::default()
    })]

    #[test]
    fn every_task_runs_once_or_not_at_all_and_after_its_response(program in program()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(follow(program));
    }
}

// ---- programs that once went wrong ----

/// GET over HTTP/1.1 of a 200 with these frames; the driver keeps a clone.
fn plain(nesting: Nesting, in_call: Vec<Registration>, frames: Vec<FrameKind>) -> Program {
    let frame = |kind| FramePlan {
        registers: Vec::new(),
        kind,
    };
    Program {
        method: Method::GET,
        version: Version::HTTP_11,
        nesting,
        capacity: None,
        max_tasks: 1024,
        concurrency: 2,
        keep_clone: true,
        handler: Handler {
            in_call,
            panics_in_call: false,
            polls: vec![Vec::new()],
            answer: Answer::Response(Reply {
                status: 200,
                grpc_status: None,
                content_length: None,
                exact_hint: false,
                tells_end_of_stream: false,
                frames: frames.into_iter().map(frame).collect(),
            }),
        },
        steps: Vec::new(),
        polls_to_the_end: true,
        late: Vec::new(),
    }
}

fn a_task() -> Registration {
    Registration {
        how: How::Run,
        on: On::Own,
        when: None,
        ends: Ends::Well,
    }
}

/// The client of a failed gRPC call stalls after the trailers: the failure is known all the same.
#[tokio::test(start_paused = true)]
async fn a_stalled_call_keeps_the_status_of_its_trailers() {
    let frames = vec![FrameKind::Data(9), FrameKind::Trailers(Some(13))];
    let mut program = plain(Nesting::None, vec![a_task()], frames);
    program.steps = vec![Step::Poll, Step::Poll, Step::Poll, Step::Stall];
    follow(program).await;
}

/// A release by force finds nothing to release: the inner executor's count of open requests must not
/// stay behind, its drain would wait for ever.
#[tokio::test(start_paused = true)]
async fn a_forced_release_of_nothing_closes_the_request_everywhere() {
    let mut program = plain(Nesting::OwnExecutor, vec![a_task()], vec![]);
    program.steps = vec![Step::Poll, Step::Cancel(0), Step::Stall];
    follow(program).await;
}

/// The first task of a request is registered while its stream waits for its own next item.
#[tokio::test(start_paused = true)]
async fn an_idle_stream_is_not_stalled_by_its_first_registration() {
    let frames = vec![FrameKind::Data(9), FrameKind::Pending, FrameKind::Data(9)];
    let mut program = plain(Nesting::None, vec![], frames);
    program.steps = vec![
        Step::Poll,
        Step::Poll,
        Step::Poll,
        Step::Register(a_task()),
        Step::Stall,
    ];
    follow(program).await;
}

/// The usual life of a stream of events: the server asks for the next item, then writes the last one.
#[tokio::test(start_paused = true)]
async fn an_idle_stream_is_not_stalled_when_its_last_chunk_has_left() {
    let frames = vec![FrameKind::Data(9), FrameKind::Pending, FrameKind::Data(9)];
    let mut program = plain(Nesting::None, vec![a_task()], frames);
    program.steps = vec![
        Step::Poll,
        Step::Poll,
        Step::Poll,
        Step::DropChunk(0),
        Step::Stall,
    ];
    follow(program).await;
}
