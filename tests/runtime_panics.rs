//! A panic that takes its runtime with it, while tasks are queued: a failing `#[tokio::test]`, say.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tower_defer::Executor;

fn panic_with_queued_tasks(polls: usize) {
    let executor = Executor::builder().concurrency(1).build();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            executor.submit(std::future::pending::<()>);
            executor.submit(|| async {});
            for _ in 0..polls {
                tokio::task::yield_now().await;
            }
            panic!("the test failed");
        });
    }));
    assert!(panicked.is_err());
}

#[test]
fn before_the_worker_was_polled() {
    panic_with_queued_tasks(0);
}

#[test]
fn while_the_worker_runs_a_task() {
    panic_with_queued_tasks(10);
}
