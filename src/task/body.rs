//! What a task runs: the user's closure, and in the same allocation the future of the attempt.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;

use super::{TaskContext, name};
use crate::error::{TaskError, panic_text};

/// What a task's future may return: `()`, or `Result<(), E>` with an error that becomes a
/// [`TaskError`] (any `std::error::Error`, a text, or a `TaskError` itself).
#[diagnostic::on_unimplemented(
    message = "a task cannot return `{Self}`",
    label = "the task returns this",
    note = "a task returns `()` or `Result<(), E>`, where `E` is an error, a text or a `TaskError`",
    note = "end the task with `.map(drop)` or `?; Ok(())` to throw a value away"
)]
pub trait TaskOutput: sealed::Sealed {
    #[doc(hidden)]
    fn into_result(self) -> Result<(), TaskError>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for () {}
    impl<E> Sealed for Result<(), E> {}
}

impl TaskOutput for () {
    fn into_result(self) -> Result<(), TaskError> {
        Ok(())
    }
}

impl<E: Into<TaskError>> TaskOutput for Result<(), E> {
    fn into_result(self) -> Result<(), TaskError> {
        self.map_err(Into::into)
    }
}

/// How a body is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// On a worker.
    Async,
    /// On a worker, and it asks for its context.
    AsyncWithContext,
    /// On a thread of its own: a poll runs it to its end.
    Blocking,
}

/// The type-erased inside of a task. Every method may run the user's code, and so may panic.
pub(crate) trait Body: Send {
    /// Begins the attempt if none has begun, and drives it. When it is ready, what the attempt held
    /// has been dropped.
    fn poll(
        self: Pin<&mut Self>,
        context: Option<&TaskContext>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), TaskError>>;

    /// Drops what the attempt holds.
    fn end(self: Pin<&mut Self>);

    fn kind(&self) -> Kind;

    /// Whether another attempt is possible.
    fn reusable(&self) -> bool;

    /// Finds the function that registered it.
    fn default_name(&self) -> fn() -> &'static str;
}

/// A closure that makes a future for each attempt: `F` is one of the [`Make`]s below.
#[pin_project]
pub(crate) struct Repeat<F: Make> {
    make: F,
    #[pin]
    future: Option<F::Future>,
}

/// Makes the future of an attempt.
pub(crate) trait Make: Send {
    const KIND: Kind;
    type Future: Future<Output: TaskOutput> + Send;
    fn make(&self, context: Option<&TaskContext>) -> Self::Future;
    fn default_name() -> &'static str;
}

impl<F: Make> Repeat<F> {
    pub(crate) fn new(make: F) -> Self {
        Self { make, future: None }
    }
}

impl<F: Make> Body for Repeat<F> {
    fn poll(
        self: Pin<&mut Self>,
        context: Option<&TaskContext>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), TaskError>> {
        let mut this = self.project();
        if this.future.is_none() {
            let future = this.make.make(context);
            this.future.set(Some(future));
        }
        let output = match this.future.as_mut().as_pin_mut() {
            Some(future) => ready!(future.poll(cx)),
            None => return Poll::Pending,
        };
        Poll::Ready(ended(output, || this.future.set(None)))
    }

    fn end(self: Pin<&mut Self>) {
        self.project().future.set(None);
    }

    fn kind(&self) -> Kind {
        F::KIND
    }

    fn reusable(&self) -> bool {
        true
    }

    fn default_name(&self) -> fn() -> &'static str {
        F::default_name
    }
}

/// Drops the future before its output is looked at. Both drops are the user's and may panic; were the
/// output dropped while the future's panic unwinds, a second panic would end the process.
fn ended<O: TaskOutput>(output: O, drop_future: impl FnOnce()) -> Result<(), TaskError> {
    match catch_unwind(AssertUnwindSafe(drop_future)) {
        Ok(()) => output.into_result(),
        Err(payload) => {
            if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(output))) {
                panic_text(second);
            }
            resume_unwind(payload)
        }
    }
}

pub(crate) struct Plain<F>(pub(crate) F);

impl<F, Fut> Make for Plain<F>
where
    F: Fn() -> Fut + Send,
    Fut: Future<Output: TaskOutput> + Send,
{
    const KIND: Kind = Kind::Async;
    type Future = Fut;

    fn make(&self, _: Option<&TaskContext>) -> Fut {
        (self.0)()
    }

    fn default_name() -> &'static str {
        name::of::<F>()
    }
}

pub(crate) struct WithState<S, F>(pub(crate) S, pub(crate) F);

impl<S, F, Fut> Make for WithState<S, F>
where
    S: Clone + Send,
    F: Fn(S) -> Fut + Send,
    Fut: Future<Output: TaskOutput> + Send,
{
    const KIND: Kind = Kind::Async;
    type Future = Fut;

    fn make(&self, _: Option<&TaskContext>) -> Fut {
        (self.1)(self.0.clone())
    }

    fn default_name() -> &'static str {
        name::of::<F>()
    }
}

pub(crate) struct WithContext<F>(pub(crate) F);

impl<F, Fut> Make for WithContext<F>
where
    F: Fn(TaskContext) -> Fut + Send,
    Fut: Future<Output: TaskOutput> + Send,
{
    const KIND: Kind = Kind::AsyncWithContext;
    type Future = Fut;

    fn make(&self, context: Option<&TaskContext>) -> Fut {
        (self.0)(given(context))
    }

    fn default_name() -> &'static str {
        name::of::<F>()
    }
}

/// The executor describes every attempt of a body that asks for its context.
fn given(context: Option<&TaskContext>) -> TaskContext {
    match context {
        Some(context) => context.clone(),
        None => unreachable!("an attempt of a body with a context is begun with a description"),
    }
}

/// A plain future: one attempt.
#[pin_project]
pub(crate) struct Once<Fut> {
    #[pin]
    future: Option<Fut>,
    begun: bool,
}

impl<Fut> Once<Fut> {
    pub(crate) fn new(future: Fut) -> Self {
        Self {
            future: Some(future),
            begun: false,
        }
    }
}

impl<Fut> Body for Once<Fut>
where
    Fut: Future<Output: TaskOutput> + Send,
{
    fn poll(
        self: Pin<&mut Self>,
        _: Option<&TaskContext>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), TaskError>> {
        let mut this = self.project();
        *this.begun = true;
        let output = match this.future.as_mut().as_pin_mut() {
            Some(future) => ready!(future.poll(cx)),
            None => return Poll::Ready(Err(TaskError::fatal("its future is spent"))),
        };
        Poll::Ready(ended(output, || this.future.set(None)))
    }

    fn end(self: Pin<&mut Self>) {
        let mut this = self.project();
        if *this.begun {
            this.future.set(None);
        }
    }

    fn kind(&self) -> Kind {
        Kind::Async
    }

    fn reusable(&self) -> bool {
        !self.begun
    }

    fn default_name(&self) -> fn() -> &'static str {
        name::of::<Fut>
    }
}

/// Work that blocks its thread, or keeps it busy.
pub(crate) struct Blocking<F> {
    attempt: F,
    name: fn() -> &'static str,
}

impl<F> Blocking<F> {
    /// `N` is the user's closure, which `attempt` may wrap.
    pub(crate) fn named<N>(attempt: F) -> Self {
        Self {
            attempt,
            name: name::of::<N>,
        }
    }
}

impl<F, R> Body for Blocking<F>
where
    F: Fn(TaskContext) -> R + Send,
    R: TaskOutput,
{
    fn poll(
        self: Pin<&mut Self>,
        context: Option<&TaskContext>,
        _: &mut Context<'_>,
    ) -> Poll<Result<(), TaskError>> {
        let body = self.as_ref().get_ref();
        Poll::Ready((body.attempt)(given(context)).into_result())
    }

    fn end(self: Pin<&mut Self>) {}

    fn kind(&self) -> Kind {
        Kind::Blocking
    }

    fn reusable(&self) -> bool {
        true
    }

    fn default_name(&self) -> fn() -> &'static str {
        self.name
    }
}
