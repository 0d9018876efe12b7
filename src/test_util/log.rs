//! What happened on the executors that a test listens to.

use tokio::sync::Notify;

use super::{Report, TaskRecord, TaskState};
use crate::executor::{Executor, Shared};
use crate::observe::Happening;
use crate::response::ResponseInfo;
use crate::sync::{Arc, Mutex, Weak};
use crate::task::{Node, TaskId, When};

/// Who listens to an executor.
#[derive(Debug, Default)]
pub(crate) struct Ears(Mutex<Vec<Weak<Log>>>);

impl Ears {
    fn open(&self, log: &Arc<Log>) {
        let mut ears = self.0.lock();
        ears.retain(|ear| ear.strong_count() > 0);
        ears.push(Arc::downgrade(log));
    }

    pub(crate) fn note(&self, happening: &Happening<'_>) {
        self.each(|log| log.note(happening));
    }

    pub(crate) fn changed(&self) {
        self.each(|log| log.changed.notify_one());
    }

    fn each(&self, tell: impl Fn(&Log)) {
        let logs: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        logs.iter().for_each(|log| tell(log));
    }
}

/// One test's view: the tasks of every executor that its requests have touched.
#[derive(Debug)]
pub(crate) struct Log {
    /// Whether its executors run nothing.
    captures: bool,
    executors: Mutex<Vec<Executor>>,
    tasks: Mutex<Vec<TaskRecord>>,
    /// A task may have come to its end, or wait for a retry.
    pub(super) changed: Notify,
}

impl Log {
    pub(crate) fn new(captures: bool) -> Arc<Self> {
        Arc::new(Self {
            captures,
            executors: Mutex::default(),
            tasks: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Listens to this executor, too. Called before it is given a task.
    pub(crate) fn attach(self: &Arc<Self>, executor: &Executor) {
        let mut executors = self.executors.lock();
        let known = |known: &Executor| Arc::ptr_eq(known.shared(), executor.shared());
        if executors.iter().any(known) {
            return;
        }
        executors.push(executor.clone());
        executor.shared().ears.open(self);
        if self.captures {
            executor.shared().held.hold();
        }
    }

    pub(super) fn executors(&self) -> Vec<Executor> {
        self.executors.lock().clone()
    }

    pub(super) fn report(&self, response: Option<ResponseInfo>) -> Report {
        Report::new(self.tasks.lock().clone(), response)
    }

    pub(super) fn clear(&self) {
        self.tasks.lock().clear();
    }

    fn note(&self, happening: &Happening<'_>) {
        match *happening {
            Happening::Accepted(node) => self.accepted(node),
            Happening::Rejected(node, reason) => {
                let rejected = record(node, None, TaskState::Rejected(reason));
                self.tasks.lock().push(rejected);
            }
            Happening::Retrying {
                node,
                attempt,
                error,
            } => self.change(node.id(), |task| {
                task.attempts = attempt;
                task.error = Some(error.to_owned());
            }),
            Happening::Ended {
                node,
                outcome,
                error,
                ..
            } => self.change(node.id(), |task| {
                task.state = TaskState::named(outcome);
                task.attempts = node.attempts() + u32::from(outcome == "completed");
                task.response = response(node).or(task.response.take());
                task.error = error.map(str::to_owned).or(task.error.take());
            }),
            Happening::Abandoned(running) => {
                self.change(running.id, |task| task.state = TaskState::Cancelled);
            }
            _ => {}
        }
    }

    /// A replayed one is known already.
    fn accepted(&self, node: &Node) {
        let mut tasks = self.tasks.lock();
        let id = node.id();
        match tasks.iter_mut().find(|task| task.id == Some(id)) {
            Some(task) => task.state = TaskState::Unfinished,
            None => tasks.push(record(node, Some(id), TaskState::Unfinished)),
        }
    }

    fn change(&self, id: TaskId, change: impl FnOnce(&mut TaskRecord)) {
        if let Some(task) = self.tasks.lock().iter_mut().find(|t| t.id == Some(id)) {
            change(task);
        }
    }
}

fn record(node: &Node, id: Option<TaskId>, state: TaskState) -> TaskRecord {
    let when = node.when().cloned().unwrap_or_else(When::unless_failed);
    TaskRecord {
        id,
        name: node.name().as_str().to_owned(),
        location: node.header().location,
        when,
        timeout: node.settings().and_then(|settings| settings.timeout),
        blocking: node.is_blocking(),
        state,
        attempts: 0,
        error: None,
        response: None,
    }
}

fn response(node: &Node) -> Option<ResponseInfo> {
    node.response().cloned()
}

impl Shared {
    /// Whether everything that may run here has ended.
    pub(super) fn is_quiet(&self) -> bool {
        self.held.is_on() || self.admission.taken() == 0
    }
}
