//! What the layer allocates, exactly. Counted on the thread that asks, whatever else runs.

use std::convert::Infallible;
use std::future::{Future, ready};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use allocation_counter::{AllocationInfo, measure};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, StreamBody};
use tower::{Layer, Service, service_fn};
use tower_defer::{Defer, DeferLayer, Executor, Task};
use tower_http::add_extension::AddExtensionLayer;

fn now<F: Future>(future: F) -> F::Output {
    let mut cx = Context::from_waker(Waker::noop());
    match pin!(future).poll(&mut cx) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("nothing here waits"),
    }
}

/// A whole request: the call, the answer, and the body frame by frame.
fn serve<S, B>(service: &mut S, request: Request<()>)
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible>,
    B: Body<Data = Bytes>,
{
    let Ok(response) = now(service.call(request));
    let mut body = pin!(response.into_body());
    let mut cx = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(frame)) = body.as_mut().poll_frame(&mut cx) {
        drop(frame);
    }
}

fn bare() -> Request<()> {
    Request::new(())
}

/// As a framework hands it over: something is in the extensions already.
fn routed() -> Request<()> {
    let mut request = Request::new(());
    // Room for what comes: the table doubles, and that is not ours.
    request.extensions_mut().insert(1_u8);
    request
}

fn count(run: impl FnOnce()) -> u64 {
    let info: AllocationInfo = measure(run);
    info.count_total
}

fn hello() -> Full<Bytes> {
    Full::new(Bytes::from_static(b"hello"))
}

#[test]
fn nothing_deferred_costs_at_most_one_more_than_an_extension() {
    let plain = || service_fn(|_: Request<()>| ready(Ok(Response::new(hello()))));
    let reads = || {
        service_fn(|request: Request<()>| {
            let defer = Defer::from_extensions(request.extensions());
            assert!(defer.is_ok());
            ready(Ok(Response::new(hello())))
        })
    };
    let layer = DeferLayer::new();
    let mut alone = plain();
    let mut with_extension = AddExtensionLayer::new(Arc::new(7_u8)).layer(plain());
    let mut ours = layer.layer(plain());
    let mut ours_read = layer.layer(reads());
    let mut nested = layer.layer(
        DeferLayer::new()
            .executor(layer.get_executor().clone())
            .layer(plain()),
    );

    let first = count(|| serve(&mut ours, bare()));
    let extension = count(|| serve(&mut with_extension, bare()));
    // The collector, which the thread keeps for its next requests.
    assert_eq!(first, extension + 1);
    for request in [bare, routed] {
        let of = |service: &mut dyn FnMut(Request<()>)| {
            let request = request();
            count(|| service(request))
        };
        assert_eq!(of(&mut |r| serve(&mut alone, r)), 0);
        let extension = of(&mut |r| serve(&mut with_extension, r));
        // All of them are the extensions' own.
        assert_eq!(of(&mut |r| serve(&mut ours, r)), extension);
        assert_eq!(of(&mut |r| serve(&mut ours_read, r)), extension);
        // An inner layer puts its own handle in the place of the outer one's: one box.
        assert_eq!(of(&mut |r| serve(&mut nested, r)), extension + 1);
    }
    assert_eq!(
        count(|| serve(&mut ours, routed())),
        count(|| drop(routed())) + 1
    );
}

/// Nothing that is allocated once (a worker, the sweep, the room of its list) is counted: one request
/// is held open, and some have been served.
fn warm(runtime: &tokio::runtime::Runtime, layer: &DeferLayer) -> impl Sized + use<> {
    let mut service = layer.layer(service_fn(|request: Request<()>| {
        let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
        for _ in 0..8 {
            defer.run(|| async {});
        }
        ready(Ok::<_, Infallible>(Response::new(hello())))
    }));
    runtime.block_on(async {
        let held = service.call(bare()).await;
        for _ in 0..4 {
            serve(&mut service, bare());
            turn().await;
        }
        held
    })
}

/// The executor's turn, on this very thread.
async fn turn() {
    for _ in 0..64 {
        tokio::task::yield_now().await;
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime")
}

/// A request that registers so many tasks, to their end.
fn whole_life(runtime: &tokio::runtime::Runtime, layer: &DeferLayer, tasks: usize) -> u64 {
    let done = Arc::new(());
    let captured = done.clone();
    let mut service = layer.layer(service_fn(move |request: Request<()>| {
        let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
        for _ in 0..tasks {
            let captured = captured.clone();
            defer.run(move || {
                let captured = captured.clone();
                async move { drop(captured) }
            });
        }
        // No chunk, so no guard.
        ready(Ok::<_, Infallible>(Response::new(Full::<Bytes>::default())))
    }));
    let request = routed();
    let completed = layer.get_executor().snapshot().completed;
    let allocations = count(|| {
        runtime.block_on(async {
            serve(&mut service, request);
            turn().await;
        });
    });
    drop(service);
    assert_eq!(Arc::strong_count(&done), 1, "every task has ended");
    let after = layer.get_executor().snapshot().completed;
    assert_eq!(after - completed, tasks as u64);
    allocations
}

#[test]
fn a_task_costs_one_allocation_from_its_registration_to_its_end_and_its_like_then_none() {
    let runtime = runtime();
    let layer = DeferLayer::new();
    let held = warm(&runtime, &layer);
    let nothing = whole_life(&runtime, &layer, 0);
    // For each task a box; the record of the response lies there from another one.
    assert_eq!(whole_life(&runtime, &layer, 1), nothing + 1);
    // One box lies there from the task before.
    assert_eq!(whole_life(&runtime, &layer, 4), nothing + 3);
    assert_eq!(whole_life(&runtime, &layer, 1), nothing);
    assert_eq!(whole_life(&runtime, &layer, 4), nothing);
    drop(held);
}

#[test]
fn what_emptied_tasks_leave_on_a_thread_is_bounded() {
    const TASKS: usize = 1_000;
    let runtime = runtime();
    let executor = Executor::new();
    let batch = |payload: [u64; 8]| {
        runtime.block_on(async {
            for _ in 0..TASKS {
                executor.submit(move || async move {
                    std::hint::black_box(payload);
                });
            }
            executor.idle().await;
        });
    };
    let submitted = measure(|| batch([7; 8]));
    let left = submitted.bytes_current;
    assert!((0..=144 * 1024).contains(&left), "{left} bytes");
    // They do not take the room of another kind, whose boxes replace theirs.
    let others = || {
        runtime.block_on(async {
            for _ in 0..64 {
                executor.submit(|| std::future::ready(()));
            }
            executor.idle().await;
        });
    };
    others();
    // As ever after: one of `block_on`'s or of the wait, and none of a task's.
    assert_eq!([count(others), count(others)], [1; 2]);
    // A task of more than 512 bytes leaves nothing.
    let large = [7_u64; 80];
    let run = || {
        runtime.block_on(async {
            executor.submit(move || async move {
                std::hint::black_box(large);
            });
            executor.idle().await;
        });
    };
    run();
    assert_eq!(measure(run).bytes_current, 0);
}

#[test]
fn what_is_said_of_a_task_costs_one_more() {
    let named = count(|| {
        drop(
            Task::new(|| async {})
                .name("mail")
                .when(tower_defer::When::always()),
        )
    });
    assert_eq!(named, 2);
    assert_eq!(count(|| drop(Task::new(|| async {}))), 1);
    assert_eq!(count(|| drop(Task::once(async {}))), 1);
    assert_eq!(count(|| drop(Task::blocking(|| {}))), 1);
}

/// The chunks of a body, allocated before anything is counted.
fn frames(sizes: &[usize], trailers: bool) -> Vec<Result<Frame<Bytes>, Infallible>> {
    let mut frames: Vec<_> = sizes
        .iter()
        .map(|size| Ok(Frame::data(Bytes::from(vec![7; *size]))))
        .collect();
    if trailers {
        frames.push(Ok(Frame::trailers(HeaderMap::new())));
    }
    frames
}

#[test]
fn a_guarded_chunk_costs_one_allocation() {
    let runtime = runtime();
    let layer = DeferLayer::new();
    let held = warm(&runtime, &layer);
    let allocations = |sizes: &[usize], trailers: bool, defers: bool| {
        let mut body = Some(frames(sizes, trailers));
        let mut service = layer.layer(service_fn(move |request: Request<()>| {
            if defers {
                let defer = Defer::from_extensions(request.extensions()).expect("it is there");
                defer.run(|| async {});
            }
            let frames = body.take().expect("one request").into_iter();
            let body = StreamBody::new(tokio_stream::iter(frames));
            ready(Ok::<_, Infallible>(Response::new(body)))
        }));
        let request = routed();
        count(|| {
            runtime.block_on(async {
                serve(&mut service, request);
                turn().await;
            });
        })
    };
    // So that a collector lies there.
    allocations(&[], false, false);
    let unguarded = allocations(&[], false, false);
    assert_eq!(
        allocations(&[10, 20, 30], true, false),
        unguarded,
        "nothing is deferred"
    );
    let task = allocations(&[], false, true);
    // A box, for the first of the tasks.
    assert_eq!(task, unguarded + 1);
    let task = allocations(&[], false, true);
    assert_eq!(task, unguarded);
    // `Bytes::from_owner` boxes the guard with the chunk; nothing else.
    assert_eq!(allocations(&[1], false, true), task + 1);
    assert_eq!(allocations(&[10, 20, 256 << 10], false, true), task + 3);
    // One for each of its four pieces, one by which they share it, and one for what is left of it.
    assert_eq!(allocations(&[1 << 20], false, true), task + 6);
    // Nothing to wait for in these.
    assert_eq!(allocations(&[0], true, true), task);
    drop(held);
}

/// What a closure and its future take: the user's share of a task.
fn own_share<F, Fut>(_: &F) -> usize
where
    F: Fn() -> Fut,
{
    size_of::<F>() + size_of::<Option<Fut>>()
}

#[test]
fn a_queued_task_costs_64_bytes_beside_its_own() {
    const TASKS: usize = 1_000;
    // No runtime: nothing can run.
    let executor = Executor::new();
    let payload = [7_u8; 40];
    let task = move || async move {
        tokio::task::yield_now().await;
        std::hint::black_box(payload);
    };
    executor.submit(task);
    let per_task = |live: AllocationInfo| {
        let live = usize::try_from(live.bytes_current).expect("more than before");
        live as f64 / TASKS as f64
    };
    let submitted = measure(|| {
        for _ in 0..TASKS {
            executor.submit(task);
        }
    });
    let of_ours = per_task(submitted) - own_share(&task) as f64;
    assert!((0.0..=64.0).contains(&of_ours), "{of_ours} bytes of ours");

    // The same through a request, collected and then released.
    let layer = DeferLayer::new().executor(executor.clone());
    let mut service = layer.layer(service_fn(move |request: Request<()>| {
        let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
        for _ in 0..TASKS {
            defer.run(task);
        }
        ready(Ok::<_, Infallible>(Response::new(hello().boxed())))
    }));
    let requested = measure(|| serve(&mut service, bare()));
    let of_ours = per_task(requested) - own_share(&task) as f64;
    // The request's collector stays with its tasks.
    assert!((0.0..=65.0).contains(&of_ours), "{of_ours} bytes of ours");
    assert_eq!(executor.snapshot().queued, 2 * TASKS as u64 + 1);
}
