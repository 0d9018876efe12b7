//! hyper without a framework: an accept loop that can stop.

use std::future::Future;
use std::io;
use std::pin::pin;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tower_service::Service;

use crate::error::BoxError;

/// Serves HTTP/1.1 and HTTP/2 (with prior knowledge) on `listener` until `stop`, then stops accepting
/// and returns when the open connections have finished their responses. Made for
/// [`Shutdown::serve`](crate::Shutdown::serve):
///
/// ```no_run
/// # use std::convert::Infallible;
/// # use bytes::Bytes;
/// # use http::{Request, Response};
/// # use http_body_util::Full;
/// use tower_defer::{DeferLayer, RequestExt, Shutdown};
///
/// # async fn ctrl_c() {}
/// # async fn run(listener: tokio::net::TcpListener) -> std::io::Result<()> {
/// async fn answer<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
///     if let Ok(defer) = request.defer() {
///         defer.run(|| async { println!("the response is out") });
///     }
///     Ok(Response::new(Full::from("hello\n")))
/// }
///
/// let layer = DeferLayer::new();
/// let service = tower::ServiceBuilder::new().layer(layer.clone()).service_fn(answer);
/// let report = Shutdown::new(&layer)
///     .serve(ctrl_c(), |stop| tower_defer::hyper::serve(listener, service, stop))
///     .await?;
/// # Ok(()) }
/// ```
///
/// A connection that fails, or that cannot be accepted for the moment, ends nothing but itself.
///
/// # Errors
///
/// None at present: the type leaves room for listeners that can fail for good.
///
/// # Cancel safety
///
/// Dropping the future stops accepting; open connections go on.
pub async fn serve<S, B>(
    listener: TcpListener,
    service: S,
    stop: impl Future<Output = ()>,
) -> io::Result<()>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let graceful = GracefulShutdown::new();
    let server = auto::Builder::new(TokioExecutor::new());
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(target: "tower_defer", error = %error, "a connection was not accepted");
                // Out of file descriptors, most often: closing connections free some.
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        // A small answer waits for nothing.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(service.clone());
        let connection = server
            .serve_connection_with_upgrades(TokioIo::new(stream), service)
            .into_owned();
        let connection = graceful.watch(connection);
        spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(target: "tower_defer", error = %error, "a connection failed");
            }
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "a connection is not a deferred task"
)]
fn spawn(connection: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(connection);
}
