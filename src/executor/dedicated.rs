//! A runtime of an executor's own, for work that keeps a CPU busy.

use tokio::runtime::{Builder, Handle, Runtime};

use crate::observe;
use crate::sync::OnceLock;

/// Made when the first task needs it; none where the system refused the threads.
#[derive(Debug, Default)]
pub(super) struct OwnRuntime(OnceLock<Option<Runtime>>);

impl OwnRuntime {
    pub(super) fn handle(&self, threads: usize) -> Option<Handle> {
        let runtime = self.0.get_or_init(|| {
            Builder::new_multi_thread()
                .worker_threads(threads)
                .thread_name("tower-defer")
                .enable_all()
                .build()
                .inspect_err(observe::no_thread)
                .ok()
        });
        runtime.as_ref().map(|runtime| runtime.handle().clone())
    }
}

impl Drop for OwnRuntime {
    /// In the background: the last handle may be dropped in async code, on these very threads even,
    /// where a runtime must not be waited for.
    fn drop(&mut self) {
        if let Some(Some(runtime)) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::executor::Executor;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn tasks_run_on_threads_of_its_own_and_it_can_be_dropped_from_one_of_them() {
        let executor = Executor::builder().dedicated(1).build();
        let (said, heard) = mpsc::sync_channel(1);
        let last = executor.clone();
        executor.submit(crate::Task::once(async move {
            tokio::time::sleep(Duration::from_millis(1)).await; // the task's own work
            let name = std::thread::current().name().map(str::to_owned);
            drop(last);
            said.send(name).expect("the test waits for it");
        }));
        drop(executor);
        let name = heard
            .recv_timeout(Duration::from_secs(10))
            .expect("the task runs");
        assert_eq!(name.as_deref(), Some("tower-defer"));
    }
}
