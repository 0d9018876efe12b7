//! A body that does what it is told, step by step.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::{Dropped, Gate, Log};

type Waiting = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

enum Step {
    Data(Bytes),
    Trailers(HeaderMap),
    Fail(&'static str),
    Wait(Waiting),
    Do(Box<dyn FnOnce() + Send + Sync>),
    Panic,
}

/// Built like a sentence: `Script::new().data("a").wait(&gate).data("b").hint(2)`.
///
/// It says `is_end_stream` after its last step only where it is told to ([`tells_end`](Self::tells_end)).
#[derive(Default)]
pub(crate) struct Script {
    steps: VecDeque<Step>,
    tells_end: bool,
    hint: Option<u64>,
    dropped: Option<Dropped>,
}

impl Script {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn data(self, data: impl Into<Bytes>) -> Self {
        self.step(Step::Data(data.into()))
    }

    pub(crate) fn trailers(self, trailers: &[(&'static str, &'static str)]) -> Self {
        let trailers = trailers.iter().map(|(name, value)| {
            let name = http::HeaderName::from_static(name);
            (name, http::HeaderValue::from_static(value))
        });
        self.step(Step::Trailers(trailers.collect()))
    }

    pub(crate) fn fail(self, text: &'static str) -> Self {
        self.step(Step::Fail(text))
    }

    pub(crate) fn panic(self) -> Self {
        self.step(Step::Panic)
    }

    /// Pending until the gate opens.
    pub(crate) fn wait(self, gate: &Gate) -> Self {
        let gate = gate.clone();
        self.step(Step::Wait(Box::pin(async move { gate.passed().await })))
    }

    /// Pending for some time: a body that is produced slowly.
    pub(crate) fn pause(self, time: Duration) -> Self {
        self.step(Step::Wait(Box::pin(async move {
            tokio::time::sleep(time).await; // the task's own work
        })))
    }

    /// Pending for ever.
    pub(crate) fn never(self) -> Self {
        self.step(Step::Wait(Box::pin(std::future::pending())))
    }

    /// Done within `poll_frame`.
    pub(crate) fn then(self, what: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.step(Step::Do(Box::new(what)))
    }

    /// Answers `is_end_stream` truly.
    pub(crate) fn tells_end(mut self) -> Self {
        self.tells_end = true;
        self
    }

    /// An exact size hint.
    pub(crate) fn hint(mut self, bytes: u64) -> Self {
        self.hint = Some(bytes);
        self
    }

    /// Notes in the log that the body has been dropped.
    pub(crate) fn notes_drop(mut self, log: &Log, what: &str) -> Self {
        self.dropped = Some(log.on_drop(what));
        self
    }

    fn step(mut self, step: Step) -> Self {
        self.steps.push_back(step);
        self
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = ScriptError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ScriptError>>> {
        loop {
            match self.steps.front_mut() {
                None => return Poll::Ready(None),
                Some(Step::Wait(waiting)) => ready!(waiting.as_mut().poll(cx)),
                Some(_) => {}
            }
            match self.steps.pop_front() {
                None | Some(Step::Wait(_)) => {}
                Some(Step::Do(what)) => what(),
                Some(Step::Panic) => panic!("the body's own panic"),
                Some(Step::Fail(text)) => return Poll::Ready(Some(Err(ScriptError(text)))),
                Some(Step::Trailers(trailers)) => {
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                Some(Step::Data(data)) => {
                    self.hint = self.hint.map(|hint| hint.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.tells_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.hint.map(SizeHint::with_exact).unwrap_or_default()
    }
}

/// What [`Script::fail`] yields.
#[derive(Debug)]
pub(crate) struct ScriptError(&'static str);

impl fmt::Display for ScriptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for ScriptError {}
