//! Random programs against a small model, under paused time (CASES.md 33): one law, the bounds, the
//! attempt counts, the order; and the counters, the log, the snapshot and the report say the same.
#![expect(
    clippy::disallowed_methods,
    reason = "the model reads the paused time, and spawns the drain beside the program"
)]

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use proptest::prelude::*;
use tokio::runtime::Builder;
use tokio::time::Instant;
use tower_defer::{
    DrainReport, Executor, Overflow, Permit, Reserve, Retry, RetryBudget, Snapshot, Task,
    TaskContext, TaskError, TaskHandle, TaskId, UnfinishedState,
};

#[path = "executor/log.rs"]
mod log;
use log::Log;

/// How one attempt goes.
#[derive(Clone, Copy, Debug)]
enum Step {
    Succeed,
    Fail,
    Fatal,
    RetryAfter(u64),
    Panic,
    /// Never ends: its timeout does it.
    Hang,
}

/// What a task does: each attempt takes a while and ends somehow; when the script is over it succeeds.
#[derive(Clone, Debug)]
struct Script {
    steps: Vec<(u64, Step)>,
    attempts: u32,
    delay: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Submit(Script),
    TrySubmit(Script),
    /// Stands in line, or takes a place; the place is used by a later `Use`.
    Reserve,
    Use(Script),
    GiveUpWaiting,
    Cancel(usize),
    Wait(u64),
    Replay(usize),
    DiscardLetter(usize),
    Drain(u64),
}

#[derive(Clone, Copy, Debug)]
struct Bounds {
    concurrency: usize,
    capacity: usize,
    overflow: Overflow,
    dead_letters: usize,
}

const TIMEOUT: u64 = 50;

fn script() -> impl Strategy<Value = Script> {
    let step = prop_oneof![
        4 => Just(Step::Succeed),
        4 => Just(Step::Fail),
        1 => Just(Step::Fatal),
        1 => (0..40_u64).prop_map(Step::RetryAfter),
        1 => Just(Step::Panic),
        1 => Just(Step::Hang),
    ];
    let steps = prop::collection::vec((prop_oneof![Just(0), 1..30_u64], step), 0..4);
    (steps, 1..4_u32, 0..40_u64).prop_map(|(steps, attempts, delay)| Script {
        steps,
        attempts,
        delay,
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => script().prop_map(Op::Submit),
        2 => script().prop_map(Op::TrySubmit),
        2 => Just(Op::Reserve),
        2 => script().prop_map(Op::Use),
        1 => Just(Op::GiveUpWaiting),
        2 => (0..40_usize).prop_map(Op::Cancel),
        6 => (0..60_u64).prop_map(Op::Wait),
        2 => (0..8_usize).prop_map(Op::Replay),
        1 => (0..8_usize).prop_map(Op::DiscardLetter),
    ]
}

fn program() -> impl Strategy<Value = (Bounds, Vec<Op>)> {
    let bounds = (1..4_usize, 1..12_usize, any::<bool>(), 0..5_usize).prop_map(
        |(concurrency, capacity, drop_oldest, dead_letters)| Bounds {
            concurrency,
            capacity,
            overflow: if drop_oldest {
                Overflow::DropOldest
            } else {
                Overflow::Reject
            },
            dead_letters,
        },
    );
    let before = prop::collection::vec(op(), 0..40);
    let drain = prop::option::of((0..200_u64).prop_map(Op::Drain));
    let after = prop::collection::vec(op(), 0..8);
    (bounds, before, drain, after).prop_map(|(bounds, mut ops, drain, after)| {
        ops.extend(drain);
        ops.extend(after);
        (bounds, ops)
    })
}

/// What the tasks themselves saw.
#[derive(Debug, Default)]
struct Seen {
    running: usize,
    most_running: usize,
    /// Who, which attempt, when.
    starts: Vec<(usize, u32, Instant)>,
    /// Who, which attempt comes next, and when the policy wants it.
    retry_due: Vec<(usize, u32, Instant)>,
}

struct Running(Arc<Mutex<Seen>>);

impl Running {
    fn enter(seen: &Arc<Mutex<Seen>>, who: usize, attempt: u32) -> Self {
        let mut now = seen.lock().unwrap();
        now.running += 1;
        now.most_running = now.most_running.max(now.running);
        now.starts.push((who, attempt, Instant::now()));
        Self(seen.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Poisoned by an assertion that failed, it must not hide which one.
        let mut seen = self.0.lock().unwrap_or_else(|e| e.into_inner());
        seen.running -= 1;
    }
}

fn task(who: usize, script: &Script, seen: &Arc<Mutex<Seen>>) -> Task {
    let (policy, script, seen) = (script.clone(), script.clone(), seen.clone());
    let task = Task::with_context(move |context: TaskContext| {
        let n = context.attempt();
        let (seen, attempts, delay) = (seen.clone(), script.attempts, script.delay);
        let (takes, step) = match script.steps.get(n as usize - 1) {
            Some(step) => *step,
            None => (0, Step::Succeed),
        };
        async move {
            let running = Running::enter(&seen, who, n);
            if takes > 0 {
                tokio::time::sleep(Duration::from_millis(takes)).await; // the task's own work
            }
            let again = |millis| {
                if n < attempts {
                    let at = Instant::now() + Duration::from_millis(millis);
                    running.0.lock().unwrap().retry_due.push((who, n + 1, at));
                }
            };
            match step {
                Step::Succeed => Ok(()),
                Step::Fail => {
                    again(delay);
                    Err(TaskError::new("failed"))
                }
                Step::Fatal => Err(TaskError::fatal("fatal")),
                Step::RetryAfter(millis) => {
                    again(millis);
                    let delay = Duration::from_millis(millis);
                    Err(TaskError::retry_after(delay, "later"))
                }
                Step::Panic => std::panic::resume_unwind(Box::new("a bug")),
                Step::Hang => std::future::pending().await,
            }
        }
    });
    let delay = Duration::from_millis(policy.delay);
    task.retry(Retry::fixed(policy.attempts, delay))
        .name(format!("task {who}"))
}

/// How many attempts a task has if nothing comes between, and whether it completes.
fn fate(script: &Script) -> (u32, bool) {
    for n in 1..=script.attempts {
        match script.steps.get(n as usize - 1).map(|(_, step)| step) {
            None | Some(Step::Succeed) => return (n, true),
            Some(Step::Fatal | Step::Panic) => return (n, false),
            Some(Step::Fail | Step::RetryAfter(_) | Step::Hang) => {}
        }
    }
    (script.attempts, false)
}

/// A task that was accepted.
struct Accepted {
    who: usize,
    script: Script,
    handle: TaskHandle,
    /// Something came between: it was cancelled or replayed.
    touched: bool,
}

struct Program {
    executor: Executor,
    bounds: Bounds,
    log: Log,
    seen: Arc<Mutex<Seen>>,
    next: usize,
    accepted: Vec<Accepted>,
    rejected: u64,
    waiting: Vec<Pin<Box<Reserve>>>,
    permits: Vec<Permit>,
    cancelled: u64,
    replayed: u64,
    drained: Option<DrainReport>,
}

impl Program {
    fn new(bounds: Bounds, log: Log) -> Self {
        let executor = Executor::builder()
            .concurrency(bounds.concurrency)
            .capacity(bounds.capacity)
            .overflow(bounds.overflow)
            .dead_letters(bounds.dead_letters)
            .timeout(Duration::from_millis(TIMEOUT))
            .retry_budget(RetryBudget::new(1_000_000, 1_000_000))
            .build();
        Self {
            executor,
            bounds,
            log,
            seen: Arc::default(),
            next: 0,
            accepted: Vec::new(),
            rejected: 0,
            waiting: Vec::new(),
            permits: Vec::new(),
            cancelled: 0,
            replayed: 0,
            drained: None,
        }
    }

    fn task(&mut self, script: &Script) -> (usize, Task) {
        let who = self.next;
        self.next += 1;
        (who, task(who, script, &self.seen))
    }

    fn note(&mut self, who: usize, script: Script, handle: TaskHandle) {
        if handle.is_accepted() {
            self.accepted.push(Accepted {
                who,
                script,
                handle,
                touched: false,
            });
        } else {
            self.rejected += 1;
        }
    }

    fn letter(&self, n: usize) -> Option<TaskId> {
        let letters = self.executor.dead_letters().list();
        letters.get(n).map(|letter| letter.id)
    }

    async fn run(&mut self, op: Op) {
        match op {
            Op::Submit(script) => {
                let (who, task) = self.task(&script);
                let handle = self.executor.submit(task);
                self.note(who, script, handle);
            }
            Op::TrySubmit(script) => {
                let (who, task) = self.task(&script);
                match self.executor.try_submit(task) {
                    Ok(handle) => self.note(who, script, handle),
                    Err(_) => self.rejected += 1,
                }
            }
            Op::Reserve => self.waiting.push(Box::pin(self.executor.reserve())),
            Op::Use(script) => {
                if let Some(permit) = self.permits.pop() {
                    let (who, task) = self.task(&script);
                    let handle = permit.submit(task);
                    self.note(who, script, handle);
                }
            }
            Op::GiveUpWaiting => {
                self.waiting.pop();
                self.permits.pop();
            }
            Op::Cancel(n) => {
                if let Some(accepted) = self.accepted.get_mut(n) {
                    if accepted.handle.cancel() {
                        accepted.touched = true;
                        self.cancelled += 1;
                    }
                }
            }
            Op::Wait(millis) => {
                tokio::time::sleep(Duration::from_millis(millis)).await; // paused time
            }
            Op::Replay(n) => {
                if let Some(id) = self.letter(n) {
                    if self.executor.dead_letters().replay(id).is_ok() {
                        self.replayed += 1;
                        let again = |a: &&mut Accepted| a.handle.id() == Some(id);
                        let one = self.accepted.iter_mut().find(again).expect("known");
                        one.touched = true;
                    }
                }
            }
            Op::DiscardLetter(n) => {
                if let Some(id) = self.letter(n) {
                    assert!(self.executor.dead_letters().discard(id));
                }
            }
            Op::Drain(millis) => {
                // Nobody else would use or give back what the program holds.
                self.permits.clear();
                self.waiting.clear();
                let within = Duration::from_millis(millis);
                self.drained = Some(self.executor.drain(within).await);
            }
        }
        self.poll_the_line();
        self.check(&self.executor.snapshot());
    }

    /// Those who wait are served in order: once one is still waiting, so are all behind it.
    fn poll_the_line(&mut self) {
        let mut still = Vec::new();
        for mut place in self.waiting.drain(..) {
            match place.as_mut().now_or_never() {
                None => still.push(place),
                Some(permit) => {
                    assert!(still.is_empty() || permit.is_err(), "overtaken in line");
                    self.permits.extend(permit);
                }
            }
        }
        self.waiting = still;
    }

    /// On one thread there is no transition in flight: all of it is exact at any moment.
    fn check(&self, now: &Snapshot) {
        let ended = now.completed + now.discarded + now.skipped + now.cancelled;
        assert_eq!(now.accepted, ended + now.outstanding, "{now:?}");
        let taken = now.outstanding + now.reserved;
        assert!(taken <= self.bounds.capacity as u64, "{now:?}");
        assert!(now.running.len() <= self.bounds.concurrency, "{now:?}");
        let seen = self.seen.lock().unwrap();
        assert!(seen.most_running <= self.bounds.concurrency);
        assert!(now.dead_letters <= self.bounds.dead_letters as u64);
        assert_eq!(now.accepted, self.accepted.len() as u64 + self.replayed);
        assert_eq!(now.rejected_full + now.rejected_closed, self.rejected);
        assert_eq!(now.replayed, self.replayed);
        let letters = now.dead_letters + now.dead_letters_lost;
        assert!(letters <= now.discarded);
    }

    async fn finish(mut self) {
        self.permits.clear();
        self.waiting.clear();
        self.executor.idle().await;
        let now = self.executor.snapshot();
        self.check(&now);
        assert_eq!(
            (now.outstanding, now.reserved, now.queued, now.waiting),
            (0, 0, 0, 0)
        );
        self.compare_with_the_log(&now);
        self.compare_with_the_report(&now);
        self.compare_with_the_fates();
        if self.bounds.concurrency == 1 {
            self.order_of_starts();
        }
    }

    fn compare_with_the_log(&self, now: &Snapshot) {
        let said = |message: &str| self.log.count(|l| l.message.starts_with(message)) as u64;
        assert_eq!(said("task registered"), self.accepted.len() as u64);
        assert_eq!(said("task completed"), now.completed);
        assert_eq!(said("task discarded"), now.discarded);
        assert_eq!(said("task cancelled"), now.cancelled);
        assert_eq!(said("task cancelled by its handle"), self.cancelled);
        assert_eq!(said("task failed, will be retried"), now.retries);
        assert_eq!(said("dead letter replayed"), now.replayed);
        assert_eq!(said("dead letter lost"), now.dead_letters_lost);
        assert_eq!(said("task rejected"), self.rejected);
        assert_eq!(said("drained"), u64::from(self.drained.is_some()));
        for accepted in &self.accepted {
            let name = format!("task {}", accepted.who);
            let ends = ["task completed", "task discarded", "task cancelled"];
            let ends: usize = ends.iter().map(|end| self.log.about(&name, end)).sum();
            let replays = self.log.about(&name, "dead letter replayed");
            assert_eq!(ends, 1 + replays, "{name}: one end for each acceptance");
        }
    }

    fn compare_with_the_report(&self, now: &Snapshot) {
        let Some(report) = &self.drained else { return };
        assert!(report.completed <= now.completed && report.cancelled <= now.cancelled);
        let named = report.unfinished.len() as u64 + report.unnamed;
        assert_eq!(named, report.discarded + report.cancelled, "{report}");
        let of = |state: fn(UnfinishedState) -> bool| {
            report.unfinished.iter().filter(|t| state(t.state)).count() as u64
        };
        let discarded = of(|state| matches!(state, UnfinishedState::Discarded(_)));
        assert_eq!(discarded, report.discarded);
        assert_eq!(of(|state| state == UnfinishedState::StillRunning), 0);
        let abandoned = of(|state| {
            use UnfinishedState::{Interrupted, NeverStarted, Waiting};
            matches!(state, Interrupted | NeverStarted | Waiting)
        });
        assert_eq!(abandoned > 0, report.timed_out && abandoned > 0);
        for unfinished in &report.unfinished {
            assert!(
                self.accepted
                    .iter()
                    .any(|a| a.handle.id() == Some(unfinished.id))
            );
        }
    }

    /// Whatever nothing came between ends as its script says, after as many attempts.
    fn compare_with_the_fates(&self) {
        let seen = self.seen.lock().unwrap();
        for accepted in self.accepted.iter().filter(|a| !a.touched) {
            let name = format!("task {}", accepted.who);
            let found = seen.starts.iter().filter(|s| s.0 == accepted.who).count() as u32;
            let completed = self.log.about(&name, "task completed") == 1;
            let (attempts, completes) = fate(&accepted.script);
            let made_room = self.log.count(|line| {
                line.field("task.name") == name && line.field("reason") == "overflow"
            });
            if made_room > 0 {
                assert_eq!(found, 0, "{name} made room though it had started");
            } else if self.drained.is_some() {
                assert!(found <= attempts, "{name}");
                assert!(!completed || (completes && found == attempts), "{name}");
            } else {
                assert_eq!((found, completed), (attempts, completes), "{name}");
            }
        }
        for starts in self.accepted.iter().map(|a| a.who) {
            let mut numbers = seen.starts.iter().filter(|s| s.0 == starts).map(|s| s.1);
            let mut last = 0;
            let in_turn = numbers.all(|n| {
                let follows = n == last + 1 || n == 1;
                last = n;
                follows
            });
            assert!(in_turn, "the attempts of task {starts} are counted in turn");
        }
    }

    /// With one worker: first starts are in the order of acceptance, and none comes before a retry
    /// that was due.
    fn order_of_starts(&self) {
        let seen = self.seen.lock().unwrap();
        let mut first = Vec::new();
        for (who, _, _) in &seen.starts {
            // One that made room and was replayed stands in line anew.
            let touched = self.accepted.iter().any(|a| a.who == *who && a.touched);
            if !touched && !first.contains(who) {
                first.push(*who);
            }
        }
        assert!(first.is_sorted(), "{first:?}");
        if self.replayed > 0 || self.drained.is_some() {
            return;
        }
        for (who, attempt, at) in seen.starts.iter().filter(|start| start.1 == 1) {
            for (retried, next, due) in &seen.retry_due {
                // A timer goes off within a millisecond, and the task that it wakes has its turn then.
                let was_due = *due + Duration::from_millis(2) < *at;
                let started = seen
                    .starts
                    .iter()
                    .any(|s| (s.0, s.1) == (*retried, *next) && s.2 <= *at);
                assert!(
                    !was_due || started,
                    "task {who} ({attempt}) started before the retry of task {retried}, which was due"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn case_33_counters_log_snapshot_and_report_agree((bounds, ops) in program()) {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let log = Log::default();
        // Of this thread, which is the only one that the program has.
        let _caught = tracing::subscriber::set_default(log.subscriber());
        runtime.block_on(async {
            let mut program = Program::new(bounds, log);
            for op in ops {
                program.run(op).await;
            }
            program.finish().await;
        });
    }
}
