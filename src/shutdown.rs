//! Serving and draining under one deadline.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::executor::{DrainReport, Executor};
use crate::middleware::DeferLayer;

/// Serves until a signal, then ends serving and draining within one deadline, counted from the signal.
///
/// A server's own graceful shutdown waits for ever on one open event stream, and knows nothing of
/// deferred tasks. This does both, for axum, tonic and hyper alike:
///
/// 1. at the signal the server stops accepting and finishes its responses;
/// 2. at half the deadline, what streaming and stalled responses still hold is released;
/// 3. the executor drains until the deadline; what is left is named in the report.
///
/// It drains the layer's executor, that of the layer's events, and those that are named with
/// [`and`](Shutdown::and); no other. At the end the store of the events is closed.
///
/// When it returns, open connections are left to the end of the runtime: return from `main`.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use axum::Router;
/// use tower_defer::{DeferLayer, Shutdown};
///
/// # async fn ctrl_c() {}
/// #[tokio::main]
/// async fn main() -> std::io::Result<()> {
///     let defer = DeferLayer::new();
///     let app = Router::new().layer(defer.clone());
///     let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
///
///     let report = Shutdown::new(&defer)
///         .deadline(Duration::from_secs(30))
///         .serve(ctrl_c(), |stop| async move {
///             axum::serve(listener, app).with_graceful_shutdown(stop).await
///         })
///         .await?;
///     eprintln!("{report}");
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug)]
#[must_use = "call `serve`"]
pub struct Shutdown {
    layer: DeferLayer,
    executors: Vec<Executor>,
    deadline: Duration,
}

impl Shutdown {
    /// For the executor of this layer (and that of its events, where they have one); [`and`](Self::and)
    /// adds others. The deadline is 25 s by default: Kubernetes kills a pod after 30 s.
    pub fn new(layer: &DeferLayer) -> Self {
        Self {
            layer: layer.clone(),
            executors: Vec::new(),
            deadline: Duration::from_secs(25),
        }
    }

    /// Drains this executor, too: an inner layer's, or one that handlers name
    /// ([`Defer::on`](crate::Defer::on)). One that is not named here is not drained.
    pub fn and(mut self, executor: &Executor) -> Self {
        self.executors.push(executor.clone());
        self
    }

    /// How long it may take from the signal to the report. Default: 25 s. Its first half belongs to the
    /// server, what is left of it to the tasks. Keep it below what the platform allows: a drain that is
    /// killed reports nothing.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Serves until `signal`, then shuts down. `server` makes the server's future from the future that
    /// tells it to stop. The reports of several executors are added up; they count what ends after the
    /// signal.
    ///
    /// The signal yields `()`: `async { let _ = tokio::signal::ctrl_c().await; }` is one.
    ///
    /// # Errors
    ///
    /// The server's error, where it ends with one; the executors are drained before it is returned,
    /// and what they report is logged.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the server's, and drains nothing.
    pub async fn serve<Sig, F, Fut, E>(mut self, signal: Sig, server: F) -> Result<DrainReport, E>
    where
        Sig: Future<Output = ()>,
        F: FnOnce(StopServing) -> Fut,
        Fut: Future<Output = Result<(), E>>,
    {
        let (stop, stopped) = oneshot::channel();
        let mut server = pin!(server(StopServing(stopped)));
        let mut signal = pin!(signal);
        let ended = tokio::select! {
            ended = &mut server => Some(ended),
            () = &mut signal => None,
        };
        // Not before: by now the layer has been applied, and it is settled where its events are delivered.
        self.executors.splice(..0, self.layer.executors());
        let clock = self.executors[0].shared().clock;
        let began = clock.now();
        let deadline = began.saturating_add(self.deadline);
        for executor in &self.executors {
            executor.shared().note_shutdown();
        }
        let half = clock.instant(began.saturating_add(self.deadline / 2));
        // The server may have dropped its end already.
        let _ = stop.send(());
        let ended = match ended {
            Some(ended) => Some(ended),
            None => tokio::time::timeout_at(half, &mut server).await.ok(),
        };
        let forced = ended.is_none();
        if forced {
            for executor in &self.executors {
                executor.shared().release_sources(false);
            }
        }
        let left = deadline.since(clock.now());
        let mut drained = pin!(drain_all(&self.executors, left, !forced));
        let (ended, report) = match ended {
            Some(ended) => (ended, drained.await),
            // The server goes on with what it still has; its end is no longer waited for.
            None => tokio::select! {
                report = &mut drained => (Ok(()), report),
                ended = &mut server => (ended, drained.await),
            },
        };
        self.close(deadline.since(clock.now())).await;
        ended.map(|()| report)
    }

    /// Leaves the store as one file. What takes longer is done at the next open.
    #[cfg(feature = "events")]
    async fn close(&self, left: Duration) {
        /// After a drain that used up its time, too.
        const LEAST: Duration = Duration::from_millis(100);
        let Some(hub) = self.layer.hub() else { return };
        match tokio::time::timeout(left.max(LEAST), hub.close()).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(error)) => crate::observe::store_failed("close", &error),
        }
    }

    #[cfg(not(feature = "events"))]
    async fn close(&self, _: Duration) {}
}

/// Drains all of them within the same time.
pub(crate) async fn drain(executors: &[Executor], within: Duration) -> DrainReport {
    drain_all(executors, within, true).await
}

/// The future that tells a server to stop accepting; see [`Shutdown::serve`].
#[derive(Debug)]
#[must_use = "give it to the server's graceful shutdown"]
pub struct StopServing(oneshot::Receiver<()>);

impl Future for StopServing {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // An error means that the shutdown is gone, and then nothing else will stop the server.
        Pin::new(&mut self.0).poll(cx).map(|_| ())
    }
}

/// Drains all at once: one after the other, the last would find its time used up by the first.
async fn drain_all(executors: &[Executor], left: Duration, requests: bool) -> DrainReport {
    let mut drains: Vec<_> = executors
        .iter()
        .map(|executor| {
            let shared = executor.shared().clone();
            let deadline = shared.clock.now().saturating_add(left);
            Some(Box::pin(
                async move { shared.drain(deadline, requests).await },
            ))
        })
        .collect();
    let mut sum: Option<DrainReport> = None;
    poll_fn(|cx| {
        for drain in &mut drains {
            let Some(future) = drain else { continue };
            let Poll::Ready(report) = future.as_mut().poll(cx) else {
                continue;
            };
            *drain = None;
            sum = Some(match sum.take() {
                Some(sum) => sum.plus(report),
                None => report,
            });
        }
        if drains.iter().all(Option::is_none) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    sum.unwrap_or_default()
}

/// SIGTERM (on Unix) or ctrl-c.
///
/// Once it has been polled, these signals no longer end the process by themselves, not even a second one:
/// that is left to what waits for this future.
///
/// # Cancel safety
///
/// Dropping the future changes nothing; a signal that came before is not seen by the next one.
///
/// # Panics
///
/// Where the system refuses to have the signal handled, or outside a tokio runtime.
#[cfg(feature = "signal")]
pub async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).expect("the system refuses SIGTERM");
        let mut interrupt = signal(SignalKind::interrupt()).expect("the system refuses SIGINT");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c()
        .await
        .expect("the system refuses ctrl-c");
}
