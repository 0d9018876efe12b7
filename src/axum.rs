//! axum: [`Defer`] as an extractor.
//!
//! `Option<Defer>` is one as well: `None` where the layer is missing. The rejections of this crate are
//! responses, so that `?` answers with them.
//!
//! ```
//! use axum::{Router, routing::post};
//! use tower_defer::{Defer, DeferLayer, Rejected};
//!
//! async fn export(defer: Defer) -> Result<&'static str, Rejected> {
//!     defer.try_run(|| async { println!("the response is out") })?; // no room: 503
//!     Ok("it is being made\n")
//! }
//!
//! async fn perhaps(defer: Option<Defer>) {
//!     if let Some(defer) = defer {
//!         defer.run(|| async { println!("the layer is there") });
//!     }
//! }
//!
//! let app: Router = Router::new()
//!     .route("/export", post(export))
//!     .route("/perhaps", post(perhaps))
//!     .layer(DeferLayer::new()); // last: outermost
//! # let _ = app;
//! ```

use axum_core::extract::{FromRequestParts, OptionalFromRequestParts};
use axum_core::response::{IntoResponse, Response};
use http::StatusCode;
use http::request::Parts;

use crate::defer::{Defer, MissingLayer};
use crate::executor::{Closed, Rejected};

impl<S: Send + Sync> FromRequestParts<S> for Defer {
    type Rejection = MissingLayer;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, MissingLayer> {
        Defer::from_extensions(&parts.extensions)
    }
}

impl<S: Send + Sync> OptionalFromRequestParts<S> for Defer {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Self::Rejection> {
        Ok(Defer::from_extensions(&parts.extensions).ok())
    }
}

/// 500: the server is put together wrongly, and the text says which line is missing.
impl IntoResponse for MissingLayer {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
    }
}

/// 503, without a text: `defer.try_run(task)?` tells the client that there is no room.
impl IntoResponse for Rejected {
    fn into_response(self) -> Response {
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    }
}

/// 503, without a text: `defer.emit(event).accepted()?` tells the client that nothing was recorded.
#[cfg(feature = "events")]
impl IntoResponse for crate::event::EmitError {
    fn into_response(self) -> Response {
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    }
}

/// 503, without a text.
impl IntoResponse for Closed {
    fn into_response(self) -> Response {
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    }
}
