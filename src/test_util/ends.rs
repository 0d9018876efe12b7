//! What a condition is asked with, without a request.

use http::StatusCode;

use crate::response::{End, ResponseInfo};
use crate::task::When;

/// Whether a task with this condition runs after such a response.
///
/// # Examples
///
/// ```
/// use tower_defer::When;
/// use tower_defer::test_util::{client_left_at, holds, response};
///
/// assert!(holds(&When::success(), &response(302)));
/// assert!(!holds(&When::success(), &response(404)));
/// assert!(!holds(&When::complete(), &client_left_at(10)));
/// ```
#[must_use]
pub fn holds(when: &When, response: &ResponseInfo) -> bool {
    when.holds(response)
}

/// A response with this status, sent to its end.
///
/// # Panics
///
/// Where `status` is not an HTTP status.
#[must_use]
#[track_caller]
pub fn response(status: u16) -> ResponseInfo {
    match StatusCode::from_u16(status) {
        Ok(status) => ResponseInfo::new(Some(status), End::Complete),
        Err(_) => panic!("{status} is not an HTTP status"),
    }
}

/// A 200 whose client left when it had been given so many bytes.
#[must_use]
pub fn client_left_at(bytes: u64) -> ResponseInfo {
    ended_at(bytes, End::Aborted)
}

/// A 200 whose client took so many bytes and then nothing for `max_hold`.
#[must_use]
pub fn stalled_at(bytes: u64) -> ResponseInfo {
    ended_at(bytes, End::Stalled)
}

/// No response: [`End::Cancelled`], [`End::Failed`] or [`End::Panicked`].
#[must_use]
pub fn without_response(end: End) -> ResponseInfo {
    ResponseInfo::new(None, end)
}

fn ended_at(bytes: u64, end: End) -> ResponseInfo {
    let mut info = ResponseInfo::new(Some(StatusCode::OK), end);
    info.bytes = bytes;
    info
}
