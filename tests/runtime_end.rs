//! A runtime ends with work outstanding: no panic, nothing lost in silence, and the next runtime goes
//! on with what was queued.
//!
//! Whatever a runtime drops counts as cancelled; whatever waits outside of it (queued, due later,
//! collected by a request) is still there.

use std::convert::Infallible;
use std::future::{Future, pending, ready};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError, mpsc};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;
use tower::{Layer, Service, service_fn};
use tower_defer::{Defer, DeferBody, DeferLayer, Executor, Snapshot, Task, TaskError, When};

/// A probe's patience; no test takes as long.
const LONG: Duration = Duration::from_secs(20);

/// Beyond every test, and within the time after which a task gives up.
const FAR: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Flavor {
    CurrentThread,
    MultiThread,
}

const FLAVORS: [Flavor; 2] = [Flavor::CurrentThread, Flavor::MultiThread];

impl Flavor {
    fn runtime(self) -> Runtime {
        let mut builder = match self {
            Flavor::CurrentThread => Builder::new_current_thread(),
            Flavor::MultiThread => Builder::new_multi_thread(),
        };
        builder
            .worker_threads(2)
            .enable_time()
            .build()
            .expect("a runtime")
    }
}

/// Panics outside of the tests' own threads, which fail by themselves. The planned ones do not call
/// the hook.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Each of the two flavors, first and second; afterwards nothing has panicked.
fn in_each(test: impl Fn(Flavor, Flavor)) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("tokio");
            if name.starts_with("tokio") || name.starts_with("tower-defer") {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            print(info);
        }));
    });
    for first in FLAVORS {
        for second in FLAVORS {
            test(first, second);
            assert_eq!(
                PANICS.load(Ordering::SeqCst),
                0,
                "{first:?}, then {second:?}"
            );
        }
    }
}

/// The law of the snapshot, at a moment when nothing moves.
fn lawful(executor: &Executor) -> Snapshot {
    let now = executor.snapshot();
    let ended = now.completed + now.discarded + now.skipped + now.cancelled;
    assert_eq!(now.accepted, ended + now.outstanding, "{now:?}");
    let parts = now.collected + now.queued + now.waiting + now.running.len() as u64;
    assert_eq!(now.outstanding, parts, "{now:?}");
    now
}

/// Asks until it holds.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let probe = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await; // the probe's pause
        }
    };
    let found = tokio::time::timeout(LONG, probe).await;
    assert!(found.is_ok(), "{what}: not within {LONG:?}");
}

/// Which tasks have run.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u32>>>);

impl Log {
    fn task(&self, number: u32) -> Task {
        Task::with(self.clone(), move |log| async move { log.note(number) })
    }

    fn note(&self, number: u32) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(number);
    }

    fn sorted(&self) -> Vec<u32> {
        let mut all = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        all.sort_unstable();
        all
    }
}

/// A task that runs and never ends; the notification says that it runs.
fn endless() -> (Task, Arc<Notify>) {
    let running = Arc::new(Notify::new());
    let task = Task::with(running.clone(), |running| async move {
        running.notify_one();
        pending::<()>().await;
    });
    (task, running)
}

async fn in_time<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(LONG, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what}: not within {LONG:?}"),
    }
}

/// A request whose handler registers these tasks and answers at once. Needs no runtime.
fn respond(
    layer: &DeferLayer,
    tasks: impl IntoIterator<Item = Task>,
) -> Response<DeferBody<Full<Bytes>>> {
    let mut tasks = Some(tasks);
    let mut service = layer.layer(service_fn(|request: Request<()>| {
        let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
        for task in tasks.take().into_iter().flatten() {
            assert!(defer.run(task).is_accepted());
        }
        let body = Full::new(Bytes::from_static(b"hello"));
        ready(Ok::<_, Infallible>(Response::new(body)))
    }));
    let mut cx = Context::from_waker(Waker::noop());
    match pin!(service.call(Request::new(()))).poll(&mut cx) {
        Poll::Ready(Ok(response)) => response,
        Poll::Pending => panic!("the service is ready at once"),
    }
}

/// The server takes the chunk and does not write it.
fn take_chunk<B>(body: &mut B) -> Bytes
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut cx = Context::from_waker(Waker::noop());
    match Pin::new(body).poll_frame(&mut cx) {
        Poll::Ready(Some(Ok(frame))) => frame.into_data().expect("a chunk"),
        _ => panic!("a chunk is there"),
    }
}

#[test]
fn the_next_runtime_goes_on_with_what_was_queued() {
    in_each(|first, second| {
        let executor = Executor::builder().concurrency(1).build();
        let log = Log::default();
        let runtime = first.runtime();
        runtime.block_on(async {
            let (task, running) = endless();
            executor.submit(task);
            running.notified().await;
            for number in 0..5 {
                executor.submit(log.task(number));
            }
        });
        assert_eq!(lawful(&executor).running.len(), 1);
        drop(runtime);

        let left = lawful(&executor);
        assert_eq!((left.cancelled, left.queued), (1, 5), "{left:?}");
        assert!(left.running.is_empty(), "{left:?}");
        second.runtime().block_on(async {
            executor.submit(log.task(5));
            in_time("quiet", executor.idle()).await;
        });
        assert_eq!(log.sorted(), [0, 1, 2, 3, 4, 5]);
        assert_eq!(lawful(&executor).completed, 6);
    });
}

/// A worker lets others go first now and then; it must not have a task in its hands meanwhile.
#[test]
fn a_worker_that_yields_holds_no_task() {
    in_each(|first, second| {
        // Sixteen in a row is what a worker runs.
        for last in 14..20 {
            let executor = Executor::builder().concurrency(1).build();
            let log = Log::default();
            let runtime = first.runtime();
            runtime.block_on(async {
                let enough = Arc::new(Notify::new());
                for number in 0..40 {
                    let (log, enough) = (log.clone(), enough.clone());
                    executor.submit(Task::once(async move {
                        log.note(number);
                        if number == last {
                            enough.notify_one();
                        }
                    }));
                }
                enough.notified().await;
            });
            drop(runtime);
            assert_eq!(
                lawful(&executor).cancelled,
                0,
                "the runtime ended after {last}"
            );
            second.runtime().block_on(async {
                executor.submit(log.task(40));
                in_time("quiet", executor.idle()).await;
            });
            assert_eq!(log.sorted(), (0..=40).collect::<Vec<_>>());
        }
    });
}

/// Nothing new is pushed in the second runtime: asking for the end is use enough.
#[test]
fn waiting_for_quiet_goes_on_with_what_was_queued() {
    in_each(|first, second| {
        for drains in [false, true] {
            let executor = Executor::builder().concurrency(1).build();
            let log = Log::default();
            // Nor was there a runtime for these.
            executor.submit(log.task(0));
            let runtime = first.runtime();
            runtime.block_on(async {
                let (task, running) = endless();
                executor.submit(task);
                running.notified().await;
                executor.submit(log.task(1));
            });
            drop(runtime);
            let runtime = second.runtime();
            runtime.block_on(async {
                if drains {
                    let report = executor.drain(LONG).await;
                    assert!(!report.timed_out && report.completed == 1, "{report}");
                } else {
                    in_time("quiet", executor.idle()).await;
                }
            });
            assert_eq!(log.sorted(), [0, 1]);
        }
    });
}

#[test]
fn without_any_runtime_a_task_waits_for_the_first() {
    in_each(|_, second| {
        let executor = Executor::new();
        let log = Log::default();
        executor.submit(log.task(0));
        assert_eq!(lawful(&executor).queued, 1);
        let report = second.runtime().block_on(executor.drain(LONG));
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_eq!(log.sorted(), [0]);
    });
}

/// Fails once, and asks to be tried again after `delay`.
fn flaky(log: &Log, number: u32, delay: Duration) -> Task {
    let failed = Arc::new(AtomicUsize::new(0));
    let log = log.clone();
    Task::new(move || {
        let (failed, log) = (failed.clone(), log.clone());
        async move {
            if failed.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err(TaskError::retry_after(delay, "not yet"));
            }
            log.note(number);
            Ok(())
        }
    })
}

#[test]
fn what_waits_for_a_retry_is_tried_by_the_next_runtime() {
    in_each(|first, second| {
        let executor = Executor::new();
        let log = Log::default();
        let runtime = first.runtime();
        runtime.block_on(async {
            executor.submit(flaky(&log, 0, Duration::from_millis(200)));
            until("waits", || executor.snapshot().retries == 1).await;
        });
        drop(runtime);
        assert_eq!(lawful(&executor).cancelled, 0);
        second.runtime().block_on(async {
            executor.submit(log.task(1));
            in_time("quiet", executor.idle()).await;
        });
        assert_eq!(log.sorted(), [0, 1]);
    });
}

#[test]
fn what_waits_for_a_retry_is_drained_by_the_next_runtime() {
    in_each(|first, second| {
        let executor = Executor::new();
        let log = Log::default();
        let runtime = first.runtime();
        runtime.block_on(async {
            executor.submit(flaky(&log, 0, FAR));
            until("waits", || executor.snapshot().waiting == 1).await;
        });
        drop(runtime);
        assert_eq!(lawful(&executor).waiting, 1);
        let report = second.runtime().block_on(executor.drain(LONG));
        assert!(!report.timed_out && report.completed == 1, "{report}");
        assert_eq!(log.sorted(), [0]);
    });
}

#[test]
fn what_an_open_request_collected_survives() {
    in_each(|first, second| {
        let layer = DeferLayer::new();
        let executor = layer.get_executor();
        let log = Log::default();
        let runtime = first.runtime();
        let response = runtime.block_on(async { respond(&layer, [log.task(0), log.task(1)]) });
        drop(runtime);
        let open = lawful(executor);
        assert_eq!((open.collected, open.open_requests), (2, 1), "{open:?}");
        // The release: on a plain thread, and the only runtime it knows is gone.
        std::thread::spawn(move || drop(response))
            .join()
            .expect("no panic");
        let released = lawful(executor);
        assert_eq!(
            (released.queued, released.open_requests),
            (2, 0),
            "{released:?}"
        );
        let runtime = second.runtime();
        let report = runtime.block_on(async {
            drop(respond(&layer, [log.task(2)]));
            executor.drain(LONG).await
        });
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_eq!(log.sorted(), [0, 1, 2]);
    });
}

#[test]
fn a_stalled_response_is_swept_by_the_next_runtime() {
    in_each(|first, second| {
        let layer = DeferLayer::new().max_hold(Duration::from_millis(40));
        let log = Log::default();
        let runtime = first.runtime();
        // Long in the future for the first runtime: it has no time to sweep.
        let (chunk, body) = {
            let _inside = runtime.enter();
            let mut body = respond(&layer, [log.task(0)]).into_body();
            (take_chunk(&mut body), body)
        };
        drop(runtime);
        assert_eq!(lawful(layer.get_executor()).cancelled, 0);
        second.runtime().block_on(async {
            let mut body = respond(&layer, [log.task(1)]).into_body();
            let chunk = take_chunk(&mut body);
            until("both are swept", || log.sorted() == [0, 1]).await;
            drop((chunk, body));
        });
        drop((chunk, body));
        let after = lawful(layer.get_executor());
        assert_eq!((after.completed, after.open_requests), (2, 0), "{after:?}");
    });
}

#[test]
fn a_release_on_a_plain_thread_runs_on_the_runtime_of_the_request() {
    in_each(|first, _| {
        let layer = DeferLayer::new();
        let log = Log::default();
        let runtime = first.runtime();
        let response = runtime.block_on(async { respond(&layer, [log.task(0)]) });
        std::thread::spawn(move || drop(response))
            .join()
            .expect("no panic");
        runtime.block_on(until("runs", || log.sorted() == [0]));
    });
}

/// Unwinds with the response in its hands.
fn unwind_with<T>(held: T) {
    let unwound = catch_unwind(AssertUnwindSafe(move || {
        let _held = held;
        resume_unwind(Box::new("planned"));
    }));
    assert!(unwound.is_err());
}

#[test]
fn a_release_while_unwinding_hands_over_as_any_other() {
    in_each(|first, second| {
        let layer = DeferLayer::new();
        let log = Log::default();
        let runtime = first.runtime();
        // With a runtime around it.
        runtime.block_on(async {
            unwind_with(respond(&layer, [log.task(0)]));
            until("runs", || log.sorted() == [0]).await;
            // On a plain thread.
            let response = respond(&layer, [log.task(1)]);
            std::thread::spawn(move || unwind_with(response))
                .join()
                .expect("caught");
            until("runs", || log.sorted() == [0, 1]).await;
        });
        let response = runtime.block_on(async { respond(&layer, [log.task(2)]) });
        drop(runtime);
        // With a runtime that is gone: no worker can be started, and none is tried for ever.
        unwind_with(response);
        second.runtime().block_on(async {
            drop(respond(&layer, [log.task(3)]));
            until("both run", || log.sorted() == [0, 1, 2, 3]).await;
        });
        lawful(layer.get_executor());
    });
}

#[test]
fn a_release_while_unwinding_without_any_runtime() {
    in_each(|_, second| {
        let layer = DeferLayer::new();
        let log = Log::default();
        unwind_with(respond(&layer, [log.task(0)]));
        assert_eq!(lawful(layer.get_executor()).queued, 1);
        let report = second.runtime().block_on(layer.drain(LONG));
        assert!(report.is_clean() && !report.timed_out, "{report}");
        assert_eq!(log.sorted(), [0]);
    });
}

#[test]
fn parked_workers_of_the_first_runtime_do_not_count_in_the_second() {
    in_each(|first, second| {
        let executor = Executor::builder().concurrency(2).build();
        let log = Log::default();
        let runtime = first.runtime();
        runtime.block_on(async {
            executor.submit(log.task(0));
            executor.submit(log.task(1));
            in_time("quiet", executor.idle()).await;
        });
        drop(runtime);
        second.runtime().block_on(async {
            // Both places for workers are needed, and free.
            let met = Arc::new(tokio::sync::Barrier::new(2));
            for number in 2..4 {
                let (met, log) = (met.clone(), log.clone());
                executor.submit(Task::once(async move {
                    met.wait().await;
                    log.note(number);
                }));
            }
            in_time("quiet", executor.idle()).await;
        });
        assert_eq!(log.sorted(), [0, 1, 2, 3]);
        lawful(&executor);
    });
}

#[test]
fn a_runtime_shut_down_in_the_background_with_everything_outstanding() {
    in_each(|first, second| {
        let executor = Executor::builder().concurrency(2).build();
        let layer = DeferLayer::new()
            .executor(executor.clone())
            .max_hold(Duration::from_millis(40));
        let log = Log::default();
        let runtime = first.runtime();
        let (release_thread, thread_waits) = mpsc::sync_channel::<()>(1);
        let thread_waits = Arc::new(Mutex::new(thread_waits));
        let (held, blocking) = runtime.block_on(async {
            executor.submit(flaky(&log, 0, FAR));
            until("waits", || executor.snapshot().waiting == 1).await;
            for _ in 0..2 {
                let (task, running) = endless();
                executor.submit(task);
                running.notified().await;
            }
            let (waits, log_of_thread) = (thread_waits.clone(), log.clone());
            executor.submit(Task::blocking(move || {
                let waits = waits.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = waits.recv();
                log_of_thread.note(1);
            }));
            until("blocks", || executor.snapshot().running.len() == 3).await;
            executor.submit(log.task(2));
            let mut stalled = respond(&layer, [log.task(3)]).into_body();
            let chunk = take_chunk(&mut stalled);
            let open = respond(&layer, [log.task(4).when(When::always())]);
            ((chunk, stalled, open), executor.snapshot())
        });
        assert_eq!(blocking.running.len(), 3, "{blocking:?}");
        runtime.shutdown_background();
        // A multi-thread runtime drops its tasks on its own threads, a moment later.
        let runtime = second.runtime();
        runtime.block_on(until("the attempts are dropped", || {
            executor.snapshot().cancelled == 2
        }));
        drop(held);
        release_thread.send(()).expect("the thread waits");
        let report = runtime.block_on(executor.drain(LONG));
        assert!(!report.timed_out, "{report}");
        assert_eq!(log.sorted(), [0, 1, 2, 3, 4]);
        let after = lawful(&executor);
        let ended = (after.completed, after.cancelled, after.open_requests);
        assert_eq!(ended, (5, 2, 0), "{after:?}");
    });
}

/// The last handles go with the runtime: nothing is left that could panic later.
#[test]
fn everything_is_dropped_at_once() {
    in_each(|first, _| {
        let layer = DeferLayer::new().max_hold(Duration::from_millis(40));
        let log = Log::default();
        let runtime = first.runtime();
        let held = runtime.block_on(async {
            let executor = layer.get_executor();
            executor.submit(flaky(&log, 0, FAR));
            let (task, running) = endless();
            executor.submit(task);
            running.notified().await;
            for number in 1..100 {
                executor.submit(log.task(number));
            }
            respond(&layer, [log.task(100)])
        });
        runtime.shutdown_background();
        drop(layer);
        drop(held);
        // What the tasks captured may outlive them; it is intact.
        assert!(log.sorted().len() <= 101);
    });
}
