//! [`Emitted`]: what became of an emission, as far as the one who made it can know.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::sync::oneshot;

use super::outgoing::Holder;
use super::store::StoreError;
use crate::executor::{RejectReason, TaskHandle};
use crate::sync::Arc;

/// Why an event was not emitted, or not recorded.
///
/// Opaque, so that it can grow: ask the `is_*` predicates. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EmitError(Kind);

#[derive(Clone, Debug)]
enum Kind {
    NoEvents,
    Unheard(&'static str),
    Ambiguous(&'static str),
    Encode(&'static str, Arc<serde_json::Error>),
    TooLarge { bytes: usize, limit: usize },
    Rejected(RejectReason),
    Store(StoreError),
    Skipped,
    Lost,
}

impl EmitError {
    pub(crate) fn no_events() -> Self {
        Self(Kind::NoEvents)
    }

    pub(super) fn unheard(event: &'static str) -> Self {
        Self(Kind::Unheard(event))
    }

    pub(super) fn ambiguous(event: &'static str) -> Self {
        Self(Kind::Ambiguous(event))
    }

    pub(super) fn encode(event: &'static str, error: serde_json::Error) -> Self {
        Self(Kind::Encode(event, Arc::new(error)))
    }

    pub(super) fn too_large(bytes: usize, limit: usize) -> Self {
        Self(Kind::TooLarge { bytes, limit })
    }

    pub(crate) fn rejected(reason: RejectReason) -> Self {
        Self(Kind::Rejected(reason))
    }

    pub(super) fn store(error: StoreError) -> Self {
        Self(Kind::Store(error))
    }

    pub(super) fn skipped() -> Self {
        Self(Kind::Skipped)
    }

    pub(super) fn lost() -> Self {
        Self(Kind::Lost)
    }

    /// The layer was given no events.
    #[must_use]
    pub fn is_no_events(&self) -> bool {
        matches!(self.0, Kind::NoEvents)
    }

    /// Nobody listens to it, and that was to be an error
    /// ([`Unheard::Error`](super::Unheard::Error)).
    #[must_use]
    pub fn is_unheard(&self) -> bool {
        matches!(self.0, Kind::Unheard(_))
    }

    /// It could not be written as JSON, or is larger than may be
    /// ([`Events::max_payload`](super::Events::max_payload)).
    #[must_use]
    pub fn is_payload(&self) -> bool {
        matches!(self.0, Kind::Encode(..) | Kind::TooLarge { .. })
    }

    /// Without a store: there was no room for its deliveries.
    #[must_use]
    pub fn reject_reason(&self) -> Option<RejectReason> {
        match self.0 {
            Kind::Rejected(reason) => Some(reason),
            _ => None,
        }
    }

    /// What the store said: it is not recorded.
    #[must_use]
    pub fn store_error(&self) -> Option<&StoreError> {
        match &self.0 {
            Kind::Store(error) => Some(error),
            _ => None,
        }
    }

    /// The handler's answer did not fulfil its condition.
    #[must_use]
    pub fn is_skipped(&self) -> bool {
        matches!(self.0, Kind::Skipped)
    }
}

impl fmt::Display for EmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::NoEvents => f.write_str(
                "the layer has no events: add `.events(Events::new(state).on(…))` to the `DeferLayer`",
            ),
            Kind::Unheard(event) => write!(
                f,
                "nobody listens to {event:?}: add a subscriber with `Events::on`, or allow it with \
                 `Events::unheard`"
            ),
            Kind::Ambiguous(event) => write!(
                f,
                "another type of event has the name {event:?}: a name stands for one type"
            ),
            Kind::Encode(event, _) => write!(f, "{event:?} cannot be written as JSON"),
            Kind::TooLarge { bytes, limit } => write!(
                f,
                "the event has {bytes} bytes as JSON, {limit} are allowed: carry ids instead of rows, \
                 or raise `Events::max_payload`"
            ),
            Kind::Rejected(reason) => write!(f, "no room for its deliveries: {}", reason.as_str()),
            Kind::Store(error) => write!(f, "the event is not recorded: {error}"),
            Kind::Skipped => {
                f.write_str("the handler's answer did not fulfil the event's condition")
            }
            Kind::Lost => f.write_str("the runtime ended before the event was recorded"),
        }
    }
}

impl Error for EmitError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.0 {
            Kind::Encode(_, error) => Some(error),
            // It says itself what the store says.
            Kind::Store(error) => error.source(),
            _ => None,
        }
    }
}

/// What became of an emission. It may be dropped: that changes nothing.
pub struct Emitted(State);

enum State {
    Refused(EmitError),
    /// Without a store: its deliveries are tasks.
    Tasks(Vec<TaskHandle>),
    Outgoing(Recorded),
}

impl Emitted {
    pub(crate) fn refused(error: EmitError) -> Self {
        Self(State::Refused(error))
    }

    pub(crate) fn tasks(tasks: Vec<TaskHandle>) -> Self {
        Self(State::Tasks(tasks))
    }

    /// It is being recorded, or will be when its request is answered.
    pub(crate) fn outgoing(recorded: Recorded) -> Self {
        Self(State::Outgoing(recorded))
    }

    /// Whether it was accepted. With a store that does not mean recorded yet: the response tells that
    /// (a 503 means no), or [`recorded`](Self::recorded).
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        self.error().is_none()
    }

    /// Why it was not accepted.
    #[must_use]
    pub fn error(&self) -> Option<&EmitError> {
        match &self.0 {
            State::Refused(error) => Some(error),
            State::Tasks(_) | State::Outgoing(_) => None,
        }
    }

    /// This, if it was accepted: for `?`, where an event that is refused is to fail the request. With the
    /// feature `axum` the error is a response, a 503 without a text.
    ///
    /// What can be refused: an event that is too large or no JSON, one that nobody listens to where that
    /// is an error, and without a store one that has no room.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tower_defer::Defer;
    /// # use tower_defer::event::{EmitError, Event};
    /// # async fn handler<E: Event>(defer: Defer, event: E) -> Result<(), EmitError> {
    /// defer.emit(event).accepted()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Why it was not accepted.
    pub fn accepted(self) -> Result<Self, EmitError> {
        match self.0 {
            State::Refused(error) => Err(error),
            State::Tasks(_) | State::Outgoing(_) => Ok(self),
        }
    }

    /// One handle for each subscriber, where there is no store.
    #[must_use]
    pub fn handles(&self) -> &[TaskHandle] {
        match &self.0 {
            State::Tasks(tasks) => tasks,
            State::Refused(_) | State::Outgoing(_) => &[],
        }
    }

    /// Waits until the event is recorded.
    ///
    /// A handler need not: its events are recorded before its answer is let go. One that awaits this
    /// all the same has its event recorded at once, whatever the answer will be. Where there is no
    /// store, there is nothing to wait for.
    ///
    /// # Errors
    ///
    /// [`EmitError`]: it was not accepted, or is not recorded.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing about the recording.
    pub fn recorded(self) -> Recorded {
        match self.0 {
            State::Refused(error) => Recorded::known(Err(error)),
            State::Tasks(_) => Recorded::known(Ok(())),
            State::Outgoing(recorded) => recorded,
        }
    }
}

impl fmt::Debug for Emitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            State::Refused(error) => f.debug_tuple("Refused").field(error).finish(),
            State::Tasks(tasks) => f.debug_tuple("Tasks").field(tasks).finish(),
            State::Outgoing(_) => f.write_str("Outgoing"),
        }
    }
}

/// The future of [`Emitted::recorded`].
#[must_use = "futures do nothing unless awaited"]
pub struct Recorded {
    known: Option<Result<(), EmitError>>,
    answer: Option<oneshot::Receiver<Result<(), EmitError>>>,
    /// It waits in an outbox, under this number.
    waits: Option<(Arc<dyn Holder>, u64)>,
}

impl Recorded {
    fn known(result: Result<(), EmitError>) -> Self {
        Self {
            known: Some(result),
            answer: None,
            waits: None,
        }
    }

    pub(crate) fn answered(answer: oneshot::Receiver<Result<(), EmitError>>) -> Self {
        Self {
            known: None,
            answer: Some(answer),
            waits: None,
        }
    }

    pub(crate) fn waiting(mut self, holder: Arc<dyn Holder>, number: u64) -> Self {
        self.waits = Some((holder, number));
        self
    }
}

impl Future for Recorded {
    type Output = Result<(), EmitError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some((holder, number)) = self.waits.take() {
            holder.hurry(number);
        }
        let Some(answer) = self.answer.as_mut() else {
            return Poll::Ready(self.known.take().unwrap_or_else(|| Err(EmitError::lost())));
        };
        let answered = ready!(Pin::new(answer).poll(cx));
        self.answer = None;
        Poll::Ready(answered.unwrap_or_else(|_| Err(EmitError::lost())))
    }
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorded")
    }
}
