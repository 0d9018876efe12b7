//! No test hangs: a thread that measures real time, whatever tokio's clock does.
//!
//! At the limit the waiting future panics, and names the tasks. A task that does not yield can hold
//! the thread on which that future would be polled: then nothing can make the test fail, and after a
//! grace the process is ended.

use std::future::Future;
use std::panic::Location;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::Notify;

use super::{Log, TaskState};
use crate::clock;
use crate::executor::Executor;
use crate::sync::{Arc, AtomicBool, Ordering};

/// From the limit to the end of the process.
const GRACE: Duration = Duration::from_secs(5);

pub(super) const LIMIT: Duration = Duration::from_secs(10);

struct Guard {
    shared: Arc<State>,
    thread: std::thread::Thread,
}

struct State {
    done: AtomicBool,
    late: Notify,
}

/// Waits for a future, but not longer than `limit` of real time.
pub(super) async fn guarded<T>(
    log: &Arc<Log>,
    limit: Duration,
    caller: &'static Location<'static>,
    future: impl Future<Output = T>,
) -> T {
    let guard = Guard::start(log.clone(), limit, caller);
    let mut future = pin!(future);
    tokio::select! {
        biased;
        value = &mut future => value,
        () = guard.shared.late.notified() => panic!("{}", complaint(log, limit, caller)),
    }
}

impl Guard {
    #[track_caller]
    fn start(log: Arc<Log>, limit: Duration, caller: &'static Location<'static>) -> Self {
        let shared = Arc::new(State {
            done: AtomicBool::new(false),
            late: Notify::new(),
        });
        let watched = shared.clone();
        let thread = std::thread::Builder::new()
            .name("tower-defer-test-guard".to_owned())
            .spawn(move || watch(&watched, &log, limit, caller));
        match thread {
            Ok(thread) => Self {
                shared,
                thread: thread.thread().clone(),
            },
            Err(error) => panic!("the system refused a thread for the test's guard: {error}"),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

fn watch(state: &State, log: &Arc<Log>, limit: Duration, caller: &'static Location<'static>) {
    if waited_in_vain(state, limit) {
        state.late.notify_one();
        if waited_in_vain(state, GRACE) {
            eprintln!(
                "{}\na task holds the test's thread and does not yield: the process ends here",
                complaint(log, limit, caller)
            );
            std::process::abort();
        }
    }
}

/// Whether the time has passed and it is not done.
fn waited_in_vain(state: &State, time: Duration) -> bool {
    let began = clock::real_now();
    loop {
        if state.done.load(Ordering::Acquire) {
            return false;
        }
        let Some(left) = time.checked_sub(began.elapsed()) else {
            return true;
        };
        std::thread::park_timeout(left);
    }
}

fn complaint(log: &Log, limit: Duration, caller: &'static Location<'static>) -> String {
    let report = log.report(None);
    let executors = log.executors();
    let mut said = format!("after {limit:?}, what was sent at {caller} has not ended");
    let unfinished = report
        .tasks()
        .iter()
        .filter(|task| task.state == TaskState::Unfinished);
    let mut none = true;
    for task in unfinished {
        none = false;
        said.push_str(&format!("\n  {task}, {}", place(&executors, task.id)));
    }
    if none {
        let reserved: u64 = executors.iter().map(|e| e.snapshot().reserved).sum();
        said.push_str(&if reserved > 0 {
            format!("\n  no task is unfinished, but {reserved} permits of `reserve` are unused")
        } else {
            "\n  no task is unfinished: the handler or the response's body does not end".to_owned()
        });
    }
    said
}

fn place(executors: &[Executor], id: Option<crate::task::TaskId>) -> String {
    let running = executors
        .iter()
        .flat_map(|executor| executor.snapshot().running)
        .find(|running| Some(running.id) == id);
    match running {
        Some(running) => format!("attempt {} is running", running.attempt),
        None => "not running".to_owned(),
    }
}
