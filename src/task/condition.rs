//! Whether a task runs, given what became of the response.

use std::fmt;

use crate::response::{End, ResponseInfo};
use crate::sync::Arc;

type Predicate = Arc<dyn Fn(&ResponseInfo) -> bool + Send + Sync>;

/// Whether a task runs, given what became of the response of the request that registered it.
///
/// A handler registers a task after its cause has happened (the user exists), so the default is
/// [`unless_failed`](When::unless_failed): that the client left does not undo the sign-up. A task that
/// is submitted without a request has no response, and its condition is not asked.
///
/// | | 2xx, 3xx | 4xx, 5xx, gRPC ≠ 0 | `Err`, panic | client left before the head | client left, body failed, truncated or stalled |
/// | --- | --- | --- | --- | --- | --- |
/// | `unless_failed` | runs | | | runs | runs |
/// | `success` | runs | | | | runs |
/// | `complete` | runs | | | | |
/// | `failure` | | runs | runs | | as the head says |
/// | `aborted` | | | | runs | runs if the client left |
/// | `always` | runs | runs | runs | runs | runs |
///
/// # Examples
///
/// ```
/// use tower_defer::{End, Task, When};
///
/// # async fn count() {}
/// let task = Task::new(|| count()).when(When::success());
/// let rude = Task::new(|| count()).when(When::new(|info| info.end == End::Aborted && info.bytes == 0));
/// # let _ = (task, rude);
/// ```
#[derive(Clone)]
pub struct When(Kind);

#[derive(Clone)]
enum Kind {
    UnlessFailed,
    Success,
    Complete,
    Failure,
    Aborted,
    Always,
    Custom(Predicate),
}

impl When {
    /// Unless the handler reported failure: a status of 400 or above, a gRPC error, an `Err`, a panic.
    /// The default.
    #[must_use]
    pub fn unless_failed() -> Self {
        Self(Kind::UnlessFailed)
    }

    /// A response below 400 (and without a gRPC error) was produced, whatever became of its body.
    #[must_use]
    pub fn success() -> Self {
        Self(Kind::Success)
    }

    /// Success, and the server took every byte of it ([`End::Complete`]).
    #[must_use]
    pub fn complete() -> Self {
        Self(Kind::Complete)
    }

    /// The handler reported failure.
    #[must_use]
    pub fn failure() -> Self {
        Self(Kind::Failure)
    }

    /// The client left, before the response or during it.
    #[must_use]
    pub fn aborted() -> Self {
        Self(Kind::Aborted)
    }

    /// Whatever happened.
    #[must_use]
    pub fn always() -> Self {
        Self(Kind::Always)
    }

    /// A condition of your own. It is asked by a worker, once, never on the response's path; one that
    /// panics makes the task a dead letter.
    #[must_use]
    pub fn new(predicate: impl Fn(&ResponseInfo) -> bool + Send + Sync + 'static) -> Self {
        Self(Kind::Custom(Arc::new(predicate)))
    }

    /// Asks the condition; a custom one may panic.
    pub(crate) fn holds(&self, info: &ResponseInfo) -> bool {
        match &self.0 {
            Kind::UnlessFailed => !info.is_failure(),
            Kind::Success => info.is_success(),
            Kind::Complete => info.is_success() && info.end == End::Complete,
            Kind::Failure => info.is_failure(),
            Kind::Aborted => info.is_aborted(),
            Kind::Always => true,
            Kind::Custom(predicate) => predicate(info),
        }
    }

    /// Whether asking it runs the user's code.
    pub(crate) fn is_custom(&self) -> bool {
        matches!(self.0, Kind::Custom(_))
    }

    pub(crate) fn as_str(&self) -> &'static str {
        match &self.0 {
            Kind::UnlessFailed => "unless_failed",
            Kind::Success => "success",
            Kind::Complete => "complete",
            Kind::Failure => "failure",
            Kind::Aborted => "aborted",
            Kind::Always => "always",
            Kind::Custom(_) => "custom",
        }
    }
}

impl Default for When {
    fn default() -> Self {
        Self::unless_failed()
    }
}

impl fmt::Debug for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "When::{}", self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::StatusCode;

    #[test]
    fn the_table() {
        let info = |status: u16, end| {
            ResponseInfo::new(
                (status > 0).then(|| StatusCode::from_u16(status).unwrap()),
                end,
            )
        };
        let mut grpc = info(200, End::Complete);
        grpc.grpc_status = Some(13);
        // unless_failed, success, complete, failure, aborted, always
        let table = [
            (info(200, End::Complete), "111001"),
            (info(302, End::Complete), "111001"),
            (info(404, End::Complete), "000101"),
            (info(500, End::Aborted), "000111"),
            (grpc, "000101"),
            (info(0, End::Failed), "000101"),
            (info(0, End::Panicked), "000101"),
            (info(0, End::Cancelled), "100011"),
            (info(200, End::Aborted), "110011"),
            (info(200, End::BodyFailed), "110001"),
            (info(200, End::Truncated), "110001"),
            (info(200, End::Stalled), "110001"),
            (info(101, End::Upgraded), "110001"),
        ];
        for (info, expected) in table {
            let found: String = [
                When::unless_failed(),
                When::success(),
                When::complete(),
                When::failure(),
                When::aborted(),
                When::always(),
            ]
            .iter()
            .map(|when| if when.holds(&info) { '1' } else { '0' })
            .collect();
            assert_eq!(found, expected, "{info:?}");
        }
    }
}
