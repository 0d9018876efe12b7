//! A runtime that is dropped by a panic, with more tasks than workers.

use tower_defer::Executor;

/// Each worker that the ending runtime refuses must not start the next one: that had no end but the
/// stack's.
#[test]
fn a_panic_ends_the_runtime_and_not_the_process() {
    let executor = Executor::builder().concurrency(2).build();
    let outer = executor.clone();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            for _ in 0..5 {
                executor.submit(std::future::pending::<()>);
            }
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            assert_eq!(executor.snapshot().running.len(), 2);
            panic!("a failed assertion");
        });
    }));
    assert!(panicked.is_err());
    let now = outer.snapshot();
    assert_eq!((now.cancelled, now.queued, now.running.len()), (2, 3, 0));
}
