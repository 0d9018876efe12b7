//! Counters, gauges and histograms, through the `metrics` facade.
//!
//! Names and labels are those of OpenTelemetry's messaging conventions where it has one. Labels are
//! the executor's name, the task's name, and words of this crate: never an id, an error's text or
//! anything of a request.
//!
//! Gauges are read from the executor's own state and published as the difference to what was
//! published before: they cannot drift, and executors of the same name add up.

use std::time::Duration;

use metrics::{Key, Label, Level, Metadata, Recorder, SharedString, Unit};

use super::events::TARGET;
use super::happening::Happening;
use crate::executor::Shared;
use crate::sync::{AtomicUsize, Mutex, Ordering};
use crate::task::{Name, Node};

const SENT: &str = "messaging.client.sent.messages";
const PROCESS_DURATION: &str = "messaging.process.duration";
const ENDED: &str = "tower_defer.tasks.ended";
const RETRIES: &str = "tower_defer.tasks.retries";
const STUCK: &str = "tower_defer.tasks.stuck";
const RELEASES: &str = "tower_defer.responses.released";
const REPLAYED: &str = "tower_defer.dead_letters.replayed";
const LOST: &str = "tower_defer.dead_letters.lost";
const QUEUED: &str = "tower_defer.tasks.queued";
const RUNNING: &str = "tower_defer.tasks.running";
const WAITING: &str = "tower_defer.tasks.waiting";
const QUEUE_WAIT: &str = "tower_defer.task.queue_wait";
const AGE: &str = "tower_defer.task.age";

const SYSTEM: &str = "messaging.system";
const OPERATION: &str = "messaging.operation.name";
const EXECUTOR: &str = "messaging.destination.name";
const TASK: &str = "task.name";
const OUTCOME: &str = "task.outcome";
const ERROR: &str = "error.type";
const RESPONSE_END: &str = "response.end";

const COUNTERS: [(&str, &str); 7] = [
    (SENT, "Tasks accepted, or with `error.type` rejected"),
    (ENDED, "Tasks that came to their end"),
    (RETRIES, "Retries decided on"),
    (STUCK, "Attempts reported as stuck"),
    (RELEASES, "Responses after which tasks were released"),
    (REPLAYED, "Dead letters replayed"),
    (
        LOST,
        "Dead letters that fell out because there were too many",
    ),
];
const GAUGES: [(&str, &str); 3] = [
    (QUEUED, "Tasks that wait for a worker"),
    (RUNNING, "Attempts that run"),
    (WAITING, "Tasks that wait for their next attempt"),
];
const HISTOGRAMS: [(&str, &str); 3] = [
    (PROCESS_DURATION, "How long an attempt took"),
    (QUEUE_WAIT, "How long a due attempt waited for a worker"),
    (AGE, "From a task's release to its end"),
];

static METADATA: Metadata<'static> = Metadata::new(TARGET, Level::INFO, None);

/// Whether a recorder is installed.
///
/// The facade's own stand-in is the one that has no state; it has no other mark. A recorder that is a
/// unit struct is taken for it (the docs say so).
fn with(record: impl FnOnce(&dyn Recorder)) {
    metrics::with_recorder(|recorder| {
        if std::mem::size_of_val(recorder) > 0 {
            record(recorder);
        }
    });
}

pub(super) fn is_on() -> bool {
    let mut on = false;
    with(|_| on = true);
    on
}

/// What of the gauges was published.
#[derive(Debug)]
pub(crate) struct Gauges {
    /// How many asked for it since the one who publishes began.
    asked: AtomicUsize,
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    described: bool,
    numbers: [usize; 3],
}

impl Default for Gauges {
    fn default() -> Self {
        Self {
            asked: AtomicUsize::new(0),
            told: Mutex::default(),
        }
    }
}

/// Publishes the gauges. One at a time does it, and once more for those who asked meanwhile: the last
/// number that is published was read after the last change.
pub(super) fn publish(shared: &Shared) {
    with(|recorder| {
        let asked = &shared.gauges.asked;
        // Sequentially consistent: who finds another publishing has its change seen by them.
        if asked.fetch_add(1, Ordering::SeqCst) > 0 {
            return;
        }
        let mut served = 1;
        loop {
            let (queued, running, waiting) = shared.occupancy();
            tell(shared, recorder, [queued, running, waiting]);
            let left = asked.fetch_sub(served, Ordering::SeqCst) - served;
            if left == 0 {
                return;
            }
            served = left;
        }
    });
}

fn tell(shared: &Shared, recorder: &dyn Recorder, numbers: [usize; 3]) {
    let mut told = shared.gauges.told.lock();
    if !told.described {
        told.described = true;
        describe(recorder);
    }
    for (at, (name, _)) in GAUGES.into_iter().enumerate() {
        let (before, now) = (told.numbers[at], numbers[at]);
        if before == now {
            continue;
        }
        told.numbers[at] = now;
        let gauge = recorder.register_gauge(&key(name, vec![executor(shared)]), &METADATA);
        if now > before {
            gauge.increment((now - before) as f64);
        } else {
            gauge.decrement((before - now) as f64);
        }
    }
}

/// The executor is gone, and what it still had with it.
pub(crate) fn retract(shared: &Shared) {
    with(|recorder| tell(shared, recorder, [0; 3]));
}

fn describe(recorder: &dyn Recorder) {
    let text = SharedString::const_str;
    for (name, said) in COUNTERS {
        recorder.describe_counter(name.into(), Some(Unit::Count), text(said));
    }
    for (name, said) in GAUGES {
        recorder.describe_gauge(name.into(), Some(Unit::Count), text(said));
    }
    for (name, said) in HISTOGRAMS {
        recorder.describe_histogram(name.into(), Some(Unit::Seconds), text(said));
    }
}

/// Counts what happened.
pub(super) fn note(shared: &Shared, happening: &Happening<'_>) {
    with(|recorder| {
        let told = Tale { shared, recorder };
        match *happening {
            Happening::Accepted(node) => told.sent(node, None),
            Happening::Rejected(node, reason) => told.sent(node, Some(reason.as_str())),
            Happening::Released(end) => {
                told.count(RELEASES, vec![Label::new(RESPONSE_END, end.as_str())]);
            }
            Happening::Began(name, wait) => told.time(QUEUE_WAIT, vec![task(name)], wait),
            Happening::AttemptEnded {
                name,
                outcome,
                took,
            } => {
                let mut labels = messaging("run", name);
                if outcome != "completed" {
                    labels.push(Label::new(ERROR, outcome));
                }
                told.time(PROCESS_DURATION, labels, took);
            }
            Happening::Retrying { node, .. } => told.count(RETRIES, vec![task(&node.name())]),
            Happening::Ended {
                node,
                outcome,
                reason,
                ..
            } => {
                told.ended(&node.name(), outcome, reason);
                let age = shared.clock.now().since(node.header().queued_at);
                // A task that was cancelled before the release has no age.
                let released = node.header().queued_at > crate::clock::Tick::ZERO;
                if released || !matches!(outcome, "cancelled" | "kept") {
                    let labels = vec![task(&node.name()), Label::new(OUTCOME, outcome)];
                    told.time(AGE, labels, age);
                }
            }
            Happening::Abandoned(running) => {
                let outcome = if running.lent { "kept" } else { "cancelled" };
                told.ended(&running.name, outcome, None);
            }
            Happening::Stuck(name) => told.count(STUCK, vec![task(name)]),
            Happening::Replayed(node) => told.count(REPLAYED, vec![task(&node.name())]),
            Happening::DeadLetterLost(name) => {
                told.count(LOST, vec![Label::new(TASK, name.to_owned())]);
            }
        }
    });
}

struct Tale<'a> {
    shared: &'a Shared,
    recorder: &'a dyn Recorder,
}

impl Tale<'_> {
    fn sent(&self, node: &Node, error: Option<&'static str>) {
        let mut labels = messaging("defer", &node.name());
        labels.extend(error.map(|error| Label::new(ERROR, error)));
        self.count(SENT, labels);
    }

    fn ended(&self, name: &Name, outcome: &'static str, reason: Option<&'static str>) {
        let mut labels = vec![task(name), Label::new(OUTCOME, outcome)];
        labels.extend(reason.map(|reason| Label::new(ERROR, reason)));
        self.count(ENDED, labels);
    }

    fn count(&self, name: &'static str, mut labels: Vec<Label>) {
        labels.push(executor(self.shared));
        self.recorder
            .register_counter(&key(name, labels), &METADATA)
            .increment(1);
    }

    fn time(&self, name: &'static str, mut labels: Vec<Label>, time: Duration) {
        labels.push(executor(self.shared));
        self.recorder
            .register_histogram(&key(name, labels), &METADATA)
            .record(time.as_secs_f64());
    }
}

fn key(name: &'static str, labels: Vec<Label>) -> Key {
    Key::from_parts(name, labels)
}

fn messaging(operation: &'static str, name: &Name) -> Vec<Label> {
    vec![
        Label::new(SYSTEM, TARGET),
        Label::new(OPERATION, operation),
        task(name),
    ]
}

fn task(name: &Name) -> Label {
    Label::new(TASK, text(name))
}

fn executor(shared: &Shared) -> Label {
    Label::new(EXECUTOR, text(&shared.config.name))
}

fn text(name: &Name) -> SharedString {
    match name {
        Name::Function(name) => SharedString::const_str(name()),
        Name::Static(name) => SharedString::const_str(name),
        Name::Shared(name) => SharedString::from_shared(name.clone()),
    }
}
