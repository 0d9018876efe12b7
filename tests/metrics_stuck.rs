//! The one metric that a thread of the executor's own counts: only the process's recorder hears it, and
//! a process has one, so it has a test binary of its own.
#![cfg(feature = "metrics")]
#![expect(clippy::disallowed_methods, reason = "a probe pauses")]

use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use tower_defer::{Executor, Task};

#[test]
fn a_stuck_attempt_is_counted() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().expect("the only recorder");
    let (let_go, held) = std::sync::mpsc::sync_channel::<()>(0);
    let held = std::sync::Mutex::new(held);
    let executor = Executor::builder().name("here").build();
    let task = Task::blocking(move || {
        let _ = held.lock().expect("not poisoned").recv();
    });
    executor.submit(task.name("stubborn").timeout(Duration::from_millis(1)));

    let stuck = || {
        snapshotter
            .snapshot()
            .into_vec()
            .into_iter()
            .any(|(key, _, _, value)| {
                let (_, key) = key.into_parts();
                let labels: Vec<_> = key.labels().map(|l| (l.key(), l.value())).collect();
                key.name() == "tower_defer.tasks.stuck"
                    && labels.contains(&("task.name", "stubborn"))
                    && labels.contains(&("messaging.destination.name", "here"))
                    && value == DebugValue::Counter(1)
            })
    };
    let found = (0..2000).any(|_| {
        std::thread::sleep(Duration::from_millis(10)); // the probe's pause
        stuck()
    });
    assert!(found, "not counted within 20 s");
    drop(let_go);
}
