//! tonic: the handle from a `tonic::Request`, the wrapped service in tonic's router, errors as
//! `Status`.

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
