//! tonic: the handle from a `tonic::Request`, the wrapped service in tonic's router, errors as
//! `Status`.
//!
//! One layer for the whole server, the first one, which in tonic is the outermost:
//!
//! ```no_run
//! # use std::{convert::Infallible, future::Ready, task::{Context, Poll}};
//! # #[derive(Clone)] struct Greeter;
//! # impl tonic::server::NamedService for Greeter { const NAME: &'static str = "example.Greeter"; }
//! # impl tower::Service<http::Request<tonic::body::Body>> for Greeter {
//! #     type Response = http::Response<tonic::body::Body>;
//! #     type Error = Infallible;
//! #     type Future = Ready<Result<Self::Response, Infallible>>;
//! #     fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> { Poll::Ready(Ok(())) }
//! #     fn call(&mut self, _: http::Request<tonic::body::Body>) -> Self::Future { std::process::abort() }
//! # }
//! # async fn ctrl_c() {}
//! use tonic::transport::Server;
//! use tower_defer::{DeferLayer, Shutdown};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let defer = DeferLayer::new();
//! let server = Server::builder().layer(defer.clone()).add_service(Greeter);
//! let address = "127.0.0.1:50051".parse()?;
//! let report = Shutdown::new(&defer)
//!     .serve(ctrl_c(), |stop| server.serve_with_shutdown(address, stop))
//!     .await?;
//! # Ok(()) }
//! ```
//!
//! Or one service of it: `.add_service(tower::Layer::layer(&defer, Greeter))`.

use tonic::server::NamedService;
use tonic::{Request, Status};

use crate::defer::{Defer, MissingLayer};
use crate::executor::{Closed, Rejected};
use crate::middleware::DeferService;

/// The handle, from a gRPC request.
///
/// # Examples
///
/// ```
/// use tower_defer::tonic::RequestExt;
///
/// # async fn method(request: tonic::Request<()>) -> Result<tonic::Response<()>, tonic::Status> {
/// let defer = request.defer()?;
/// defer.run(|| async { println!("the trailers are out") });
/// # Ok(tonic::Response::new(())) }
/// ```
pub trait RequestExt {
    /// As [`Defer::from_extensions`].
    ///
    /// # Errors
    ///
    /// [`MissingLayer`], which becomes a [`Status`] by `?`.
    fn defer(&self) -> Result<Defer, MissingLayer>;
}

impl<T> RequestExt for Request<T> {
    fn defer(&self) -> Result<Defer, MissingLayer> {
        // tonic's are http's.
        Defer::from_extensions(self.extensions())
    }
}

impl<S: NamedService> NamedService for DeferService<S> {
    const NAME: &'static str = S::NAME;
}

/// `INTERNAL`: the server is put together wrongly.
impl From<MissingLayer> for Status {
    fn from(error: MissingLayer) -> Self {
        Status::internal(error.to_string())
    }
}

/// `UNAVAILABLE`: there is no room now.
impl From<Rejected> for Status {
    fn from(_: Rejected) -> Self {
        Status::unavailable("no room for the work that this request defers")
    }
}

/// `UNAVAILABLE`: the server shuts down.
impl From<Closed> for Status {
    fn from(_: Closed) -> Self {
        Status::unavailable("the server shuts down")
    }
}
