//! What an attack on the executor found.
#![expect(
    clippy::disallowed_methods,
    reason = "the tests let tasks begin before they end them"
)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use tokio::sync::oneshot;
use tower_defer::{Executor, Task, TaskContext, TaskError};
use tracing_subscriber::layer::{Context, SubscriberExt};

const LONG: Duration = Duration::from_secs(20);

/// Its drop panics, also that of each clone.
#[derive(Clone)]
struct PanicsInDrop;

impl Drop for PanicsInDrop {
    fn drop(&mut self) {
        panic!("in the drop");
    }
}

/// The attempt and the closure drop one each: together, in one unwinding, they would end the process.
#[tokio::test]
async fn an_interrupted_attempt_whose_state_panics_in_its_drop_does_not_end_the_process() {
    let executor = Executor::new();
    let (began, has_begun) = oneshot::channel();
    let began = std::sync::Mutex::new(Some(began));
    let state = PanicsInDrop;
    executor.submit(Task::with(state, move |state| {
        let began = began.lock().expect("not poisoned").take();
        async move {
            let _state = state;
            let _ = began.expect("one attempt").send(());
            std::future::pending::<()>().await;
        }
    }));
    has_begun.await.expect("the attempt has begun");
    let report = executor.drain(Duration::ZERO).await;
    assert_eq!((report.cancelled, report.unfinished.len()), (1, 1));
    assert_eq!(executor.snapshot().outstanding, 0);
}

static WATCHED: OnceLock<Executor> = OnceLock::new();

/// An operator's alarm: what it is told makes it look at the executor.
struct LooksAtWarnings(mpsc::SyncSender<usize>);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for LooksAtWarnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() != tracing::Level::WARN {
            return;
        }
        if let Some(executor) = WATCHED.get() {
            let _ = self.0.send(executor.snapshot().running.len());
        }
    }
}

/// The watch reports from a thread of its own, so the subscriber has to be that of the process.
#[test]
fn a_subscriber_may_take_a_snapshot_when_a_task_is_stuck() {
    let (said, heard) = mpsc::sync_channel(16);
    let subscriber = tracing_subscriber::registry().with(LooksAtWarnings(said));
    tracing::subscriber::set_global_default(subscriber).expect("the only one");
    let executor = WATCHED.get_or_init(Executor::new);
    let (release, released) = mpsc::sync_channel::<()>(1);
    let released = std::sync::Mutex::new(released);
    let task = Task::blocking(move || {
        let _ = released.lock().expect("not poisoned").recv_timeout(LONG);
    });
    executor.submit(task.timeout(Duration::from_millis(1)));
    let running = heard
        .recv_timeout(LONG)
        .expect("the subscriber has its snapshot");
    assert_eq!(running, 1);
    let _ = release.send(());
}

/// Each run takes less than its timeout; only together they take longer.
#[tokio::test]
async fn a_replay_does_not_inherit_the_time_of_the_run_before_it() {
    let executor = Executor::new();
    let told = Arc::new(AtomicUsize::new(0));
    let told_to_stop = told.clone();
    let task = Task::blocking_with_context(move |context: TaskContext| {
        std::thread::sleep(Duration::from_millis(700)); // the task's own work
        told_to_stop.fetch_add(usize::from(context.is_cancelled()), Ordering::SeqCst);
        Err::<(), _>(TaskError::fatal("no"))
    });
    executor.submit(task.timeout(Duration::from_secs(1)));
    for _ in 0..3 {
        executor.idle().await;
        let id = executor.dead_letters().list()[0].id;
        executor.dead_letters().replay(id).expect("there is room");
    }
    executor.idle().await;
    assert_eq!(
        told.load(Ordering::SeqCst),
        0,
        "told to stop before its time"
    );
    assert_eq!(executor.snapshot().stuck, 0);
}
