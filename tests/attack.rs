//! What an attack on the executor found.
#![expect(
    clippy::disallowed_methods,
    reason = "the tests let tasks begin before they end them"
)]

use std::time::Duration;

use tokio::sync::oneshot;
use tower_defer::{Executor, Task};

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
