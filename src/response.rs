//! What is known of a response once it is over: plain data and one pure function.
//!
//! It lies below every other room, because conditions ([`When`](crate::When)) and task contexts speak
//! of a response as the middleware does, and neither may know the other.

use std::time::Duration;

use http::StatusCode;

use crate::sync::Arc;

/// How a response ended, as the server's side can know it.
///
/// "Complete" means that the server took every byte, or threw it away with a connection that died
/// afterwards. It is never the client's acknowledgement: no server has that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum End {
    /// The server took every byte of the response.
    Complete,
    /// The client left in mid-body.
    Aborted,
    /// The body yielded an error (or panicked) instead of its next frame.
    BodyFailed,
    /// The body ended with fewer bytes than its declared length; the client sees a broken response.
    Truncated,
    /// The connection was upgraded (101, or CONNECT with 2xx); what follows is not HTTP.
    Upgraded,
    /// Released before its end: the client made no progress for `max_hold`, or a shutdown could not
    /// wait for it any longer.
    Stalled,
    /// No response: the handler's future was dropped, which is what a server does when the client
    /// leaves before the answer.
    Cancelled,
    /// No response: the service returned an error.
    Failed,
    /// No response: the service panicked.
    Panicked,
}

impl End {
    /// The name in logs and metric labels, for example `body_failed`.
    pub fn as_str(self) -> &'static str {
        match self {
            End::Complete => "complete",
            End::Aborted => "aborted",
            End::BodyFailed => "body_failed",
            End::Truncated => "truncated",
            End::Upgraded => "upgraded",
            End::Stalled => "stalled",
            End::Cancelled => "cancelled",
            End::Failed => "failed",
            End::Panicked => "panicked",
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What became of the response of the request that registered a task.
///
/// A [condition](crate::When) is asked with it, and a task can read it from its
/// [context](crate::TaskContext::response).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ResponseInfo {
    /// The status of the head; `None` where there was no response.
    pub status: Option<StatusCode>,
    /// The code of `grpc-status`, from the trailers or, for a trailers-only answer, from the head.
    /// 0 is success.
    pub grpc_status: Option<i32>,
    /// How it ended.
    pub end: End,
    /// Bytes of body that were handed to the server (inside every compressing layer).
    pub bytes: u64,
    /// The body's error for [`End::BodyFailed`], at most 1 KiB of it.
    pub body_error: Option<Arc<str>>,
    /// From the request's first registration to the head, where the head came later.
    pub to_head: Option<Duration>,
    /// From the request's first registration to the release of its tasks.
    pub to_release: Duration,
}

impl ResponseInfo {
    /// For tests of conditions, and for the cases that have no response.
    pub fn new(status: Option<StatusCode>, end: End) -> Self {
        Self {
            status,
            grpc_status: None,
            end,
            bytes: 0,
            body_error: None,
            to_head: None,
            to_release: Duration::ZERO,
        }
    }

    /// Whether a response was produced, with a status below 400 and no gRPC error.
    pub fn is_success(&self) -> bool {
        self.status.is_some() && !self.is_failure()
    }

    /// Whether the handler reported failure: a status of 400 or above, a gRPC error, an `Err`, a panic.
    ///
    /// That the client left is not a failure: what the handler did is done.
    pub fn is_failure(&self) -> bool {
        self.status.is_some_and(|status| status.as_u16() >= 400)
            || self.grpc_status.is_some_and(|code| code != 0)
            || matches!(self.end, End::Failed | End::Panicked)
    }

    /// Whether the client left, before the response or during it.
    pub fn is_aborted(&self) -> bool {
        matches!(self.end, End::Aborted | End::Cancelled)
    }
}

/// What a body wrapper saw of a body when the server dropped it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BodySeen {
    /// An error was yielded, or the body panicked.
    pub(crate) failed: bool,
    /// 101, or CONNECT with 2xx.
    pub(crate) upgraded: bool,
    /// HEAD, 204, 304, or `is_end_stream` from the start: servers never poll these.
    pub(crate) bodiless: bool,
    /// `None`, trailers, or `is_end_stream` after a frame was seen.
    pub(crate) ended: bool,
    /// The length that the head or the first size hint declared.
    pub(crate) declared: Option<u64>,
    /// Bytes yielded.
    pub(crate) yielded: u64,
    /// HTTP/1: the server stops asking once it has the declared length.
    pub(crate) http1: bool,
}

/// How a body ended that the server dropped. The order of the questions is the rule.
pub(crate) fn classify(seen: BodySeen) -> End {
    let short = seen
        .declared
        .is_some_and(|declared| seen.yielded < declared);
    let whole = seen
        .declared
        .is_some_and(|declared| seen.yielded >= declared);
    if seen.failed {
        End::BodyFailed
    } else if seen.upgraded {
        End::Upgraded
    } else if seen.bodiless {
        End::Complete
    } else if seen.ended && short {
        End::Truncated
    } else if seen.ended || (seen.http1 && whole) {
        End::Complete
    } else {
        End::Aborted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_the_questions() {
        let base = BodySeen {
            declared: Some(10),
            http1: true,
            ..BodySeen::default()
        };
        let table = [
            (
                BodySeen {
                    failed: true,
                    ended: true,
                    upgraded: true,
                    ..base
                },
                End::BodyFailed,
            ),
            (
                BodySeen {
                    upgraded: true,
                    bodiless: true,
                    ..base
                },
                End::Upgraded,
            ),
            (
                BodySeen {
                    bodiless: true,
                    ..base
                },
                End::Complete,
            ),
            (
                BodySeen {
                    ended: true,
                    yielded: 9,
                    ..base
                },
                End::Truncated,
            ),
            (
                BodySeen {
                    ended: true,
                    yielded: 10,
                    ..base
                },
                End::Complete,
            ),
            (
                BodySeen {
                    ended: true,
                    declared: None,
                    ..base
                },
                End::Complete,
            ),
            (
                BodySeen {
                    yielded: 10,
                    ..base
                },
                End::Complete,
            ),
            (
                BodySeen {
                    yielded: 10,
                    http1: false,
                    ..base
                },
                End::Aborted,
            ),
            (BodySeen { yielded: 9, ..base }, End::Aborted),
            (
                BodySeen {
                    declared: None,
                    yielded: 9,
                    ..base
                },
                End::Aborted,
            ),
            (
                BodySeen {
                    declared: Some(0),
                    ..base
                },
                End::Complete,
            ),
        ];
        for (seen, end) in table {
            assert_eq!(classify(seen), end, "{seen:?}");
        }
    }

    #[test]
    fn leaving_is_not_failing() {
        for end in [End::Cancelled, End::Aborted, End::BodyFailed, End::Stalled] {
            assert!(!ResponseInfo::new(None, end).is_failure(), "{end}");
        }
        let mut info = ResponseInfo::new(Some(StatusCode::OK), End::Complete);
        info.grpc_status = Some(13);
        assert!(info.is_failure() && !info.is_success());
    }
}
