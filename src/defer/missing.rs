//! The layer is missing.

use std::fmt;

use http::Request;

use super::Defer;

/// The request has passed no [`DeferLayer`](crate::DeferLayer). The text says which line to add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingLayer(pub(crate) ());

impl fmt::Display for MissingLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "no `tower_defer::DeferLayer` on the way of this request: add \
             `.layer(tower_defer::DeferLayer::new())` to the router or server, after its routes",
        )
    }
}

impl std::error::Error for MissingLayer {}

/// The handle, from the request itself.
///
/// # Examples
///
/// ```
/// use tower_defer::RequestExt;
///
/// # fn handler(request: http::Request<()>) -> Result<(), tower_defer::MissingLayer> {
/// request.defer()?.run(|| async { println!("the response is out") });
/// # Ok(()) }
/// ```
pub trait RequestExt {
    /// As [`Defer::from_extensions`].
    ///
    /// # Errors
    ///
    /// [`MissingLayer`], which says which line to add.
    fn defer(&self) -> Result<Defer, MissingLayer>;
}

impl<B> RequestExt for Request<B> {
    fn defer(&self) -> Result<Defer, MissingLayer> {
        Defer::from_extensions(self.extensions())
    }
}
