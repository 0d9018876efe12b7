//! What an attack on the executor found.
#![expect(
    clippy::disallowed_methods,
    reason = "the tests let tasks begin before they end them"
)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tokio::sync::oneshot;
use tower::{Layer, ServiceExt, service_fn};
use tower_defer::{
    Defer, DeferLayer, Executor, Overflow, Task, TaskContext, TaskError, UnfinishedState, When,
};
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
        // The other tests warn, too, on threads of their own.
        let is_watch = std::thread::current().name() == Some("tower-defer-watch");
        if *event.metadata().level() != tracing::Level::WARN || !is_watch {
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

fn defer_of<B>(request: &Request<B>) -> Defer {
    Defer::from_extensions(request.extensions()).expect("there is a layer")
}

fn hello() -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(Response::new(Full::from("hello")))
}

/// A hook that submits (a notice of the loss, say) discards the next task by that, and so on through the
/// whole queue, one frame of the stack deeper each time: with the default capacity the process ends.
#[tokio::test]
async fn a_hook_that_submits_does_not_push_out_the_whole_queue() {
    let itself = Arc::new(OnceLock::<Executor>::new());
    let hook = itself.clone();
    let executor = Executor::builder()
        .capacity(100)
        .overflow(Overflow::DropOldest)
        .on_dead_letter(move |_| {
            hook.get().expect("set").submit(|| async {});
        })
        .build();
    itself.set(executor.clone()).expect("once");
    // Nothing is awaited, so nothing starts.
    for _ in 0..101 {
        executor.submit(|| async {});
    }
    let discarded = executor.snapshot().discarded;
    assert!(
        discarded <= 2,
        "{discarded} of 100 tasks were discarded for one"
    );
}

/// A request that passes an inner layer when the outer response is over: its drain must not wait for it.
#[tokio::test]
async fn an_inner_layer_that_is_reached_after_the_response_leaves_no_open_request() {
    let inner_executor = Executor::new();
    let inner = DeferLayer::new()
        .executor(inner_executor.clone())
        .layer(service_fn(|_: Request<()>| async { hello() }));
    let (keep, kept) = std::sync::mpsc::sync_channel(1);
    let outer = DeferLayer::new().layer(service_fn(move |request: Request<()>| {
        keep.send(request).expect("the test keeps it");
        async { hello() }
    }));
    let response = outer.oneshot(Request::new(())).await.expect("infallible");
    response.into_body().collect().await.expect("infallible");
    let request = kept.recv().expect("the handler has run");
    inner.oneshot(request).await.expect("infallible");
    assert_eq!(inner_executor.snapshot().open_requests, 0);
}

/// Tasks for an executor that the handler named lie in the collector of the layer's.
#[tokio::test]
async fn what_a_pending_handler_registered_on_another_executor_is_named_by_its_drain() {
    let other = Executor::new();
    let named = other.clone();
    let (began, has_begun) = oneshot::channel();
    let began = std::sync::Mutex::new(Some(began));
    let app = DeferLayer::new().layer(service_fn(move |request: Request<()>| {
        defer_of(&request)
            .on(&named)
            .run(Task::new(|| async {}).name("for-other"));
        let began = began.lock().expect("not poisoned").take();
        async move {
            let _ = began.expect("one request").send(());
            std::future::pending::<()>().await;
            hello()
        }
    }));
    let request = tokio::spawn(app.oneshot(Request::new(())));
    has_begun.await.expect("the handler runs");
    let report = other.drain(Duration::ZERO).await;
    request.abort();
    assert_eq!((report.cancelled, report.unfinished.len()), (1, 1));
}

/// The same the other way round: the drain of the layer's executor is none of the other's business.
#[tokio::test]
async fn a_drain_does_not_cancel_the_tasks_of_an_executor_that_is_not_drained() {
    let other = Executor::new();
    let named = other.clone();
    let layer = DeferLayer::new();
    let (began, has_begun) = oneshot::channel();
    let began = std::sync::Mutex::new(Some(began));
    let app = layer.layer(service_fn(move |request: Request<()>| {
        defer_of(&request)
            .on(&named)
            .run(Task::new(|| async {}).name("for-other"));
        let began = began.lock().expect("not poisoned").take();
        async move {
            let _ = began.expect("one request").send(());
            std::future::pending::<()>().await;
            hello()
        }
    }));
    let request = tokio::spawn(app.oneshot(Request::new(())));
    has_begun.await.expect("the handler runs");
    layer.drain(Duration::ZERO).await;
    assert_eq!(other.snapshot().cancelled, 0);
    request.abort();
}

/// In a condition that blocks, a task is in no list and in no slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_whose_condition_blocks_is_named_and_does_not_run_after_the_report() {
    let layer = DeferLayer::new();
    let (asked, is_asked) = mpsc::sync_channel(1);
    let (release, released) = mpsc::sync_channel::<()>(1);
    let released = Arc::new(std::sync::Mutex::new(released));
    let ran = Arc::new(AtomicUsize::new(0));
    let runs = ran.clone();
    let app = layer.layer(service_fn(move |request: Request<()>| {
        let (asked, released, runs) = (asked.clone(), released.clone(), runs.clone());
        let task = Task::new(move || {
            runs.fetch_add(1, Ordering::SeqCst);
            async {}
        });
        defer_of(&request).run(task.when(When::new(move |_| {
            asked.send(()).expect("the test waits");
            let _ = released.lock().expect("not poisoned").recv_timeout(LONG);
            true
        })));
        async { hello() }
    }));
    let response = app.oneshot(Request::new(())).await.expect("infallible");
    response.into_body().collect().await.expect("infallible");
    tokio::task::spawn_blocking(move || is_asked.recv_timeout(LONG))
        .await
        .expect("no panic")
        .expect("the condition is asked");
    let report = layer.drain(Duration::ZERO).await;
    release.send(()).expect("the condition waits");
    let executor = layer.get_executor().clone();
    executor.idle().await;
    let states: Vec<UnfinishedState> = report.unfinished.iter().map(|task| task.state).collect();
    assert_eq!(
        (states.len(), ran.load(Ordering::SeqCst)),
        (1, 0),
        "{states:?}"
    );
}

/// A worker is parked for ten seconds or little more, whatever the timeout of the attempt before.
#[tokio::test]
async fn an_idle_worker_does_not_stay_for_the_timeout_of_its_last_attempt() {
    let executor = Executor::builder()
        .timeout(Duration::from_secs(24 * 3600))
        .build();
    executor.submit(tokio::task::yield_now);
    executor.idle().await;
    let alive = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    assert_eq!(alive(), 1);
    tokio::time::timeout(Duration::from_secs(60), async {
        while alive() > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await; // the probe's pause
        }
    })
    .await
    .expect("the worker ends");
    // The next task starts another.
    executor.submit(|| async {});
    executor.idle().await;
    assert_eq!(executor.snapshot().completed, 2);
}

/// Nothing was said of these tasks, so a worker runs them on its short way, which has a guard of its own.
#[tokio::test]
async fn a_task_without_settings_that_panics_is_a_dead_letter_and_its_worker_goes_on() {
    let executor = Executor::builder().concurrency(1).build();
    executor.submit(|| {
        assert!(std::hint::black_box(false), "in the closure");
        async {}
    });
    executor.submit(|| async { assert!(std::hint::black_box(false), "at once") });
    executor.submit(|| async {
        tokio::task::yield_now().await;
        assert!(std::hint::black_box(false), "later");
    });
    executor.submit(|| async {});
    tokio::time::timeout(LONG, executor.idle())
        .await
        .expect("nothing is lost");
    let letters = executor.dead_letters().list();
    let errors: Vec<&str> = letters.iter().map(|letter| &*letter.error).collect();
    for text in ["in the closure", "at once", "later"] {
        assert!(
            errors.iter().any(|error| error.contains(text)),
            "{errors:?}"
        );
    }
    let now = executor.snapshot();
    assert_eq!((now.completed, now.discarded), (1, 3));
}
