//! What a task runs: the user's closure, and in the same allocation the future of the attempt.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;

use super::spent::{self, Shelf};
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

/// What is known of a body without running it. One call for both, because each attempt asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct About {
    pub(crate) kind: Kind,
    /// Finds the function that registered it.
    pub(crate) name: fn() -> &'static str,
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

    /// Drops what the attempt holds, once it has begun.
    fn end(self: Pin<&mut Self>);

    fn about(&self) -> About;

    /// Whether another attempt is possible. Asked between attempts.
    fn reusable(&self) -> bool;

    /// Drops everything that is the user's. Returns where the empty body may wait for its next use.
    fn empty(self: Pin<&mut Self>) -> Option<Shelf>;

    /// Fills an empty body again, if this is content for it: an `Option` of what it is made of.
    fn refill(self: Pin<&mut Self>, content: &mut dyn Any) -> bool;
}

/// A body that can be emptied and filled again.
pub(super) trait Reuse: Body + Sized + 'static {
    type Content: 'static;
    fn filled(content: Self::Content) -> Self;
}

/// A closure that makes a future for each attempt: `F` is one of the [`Make`]s below.
#[pin_project]
pub(crate) struct Repeat<F: Make> {
    /// None when it is empty.
    make: Option<F>,
    #[pin]
    future: Option<F::Future>,
}

/// Makes the future of an attempt.
pub(crate) trait Make: Send + 'static {
    const KIND: Kind;
    type Future: Future<Output: TaskOutput> + Send;
    fn make(&self, context: Option<&TaskContext>) -> Self::Future;
    fn default_name() -> &'static str;
}

impl<F: Make<Future: 'static>> Reuse for Repeat<F> {
    type Content = F;

    fn filled(make: F) -> Self {
        Self {
            make: Some(make),
            future: None,
        }
    }
}

impl<F: Make<Future: 'static>> Body for Repeat<F> {
    fn poll(
        self: Pin<&mut Self>,
        context: Option<&TaskContext>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), TaskError>> {
        let mut this = self.project();
        if this.future.is_none() {
            let Some(make) = this.make else {
                unreachable!("nobody runs an emptied task")
            };
            let future = make.make(context);
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

    fn about(&self) -> About {
        About {
            kind: F::KIND,
            name: F::default_name,
        }
    }

    fn reusable(&self) -> bool {
        true
    }

    fn empty(self: Pin<&mut Self>) -> Option<Shelf> {
        let mut this = self.project();
        // One after the other, each out of its place: a panic of the first leaves the second where it is.
        if this.future.is_some() {
            this.future.set(None);
        }
        drop(this.make.take());
        spent::is_kept::<Self>().then(Shelf::of::<Self>)
    }

    fn refill(self: Pin<&mut Self>, content: &mut dyn Any) -> bool {
        let Some(content) = content.downcast_mut::<Option<F>>() else {
            return false;
        };
        *self.project().make = content.take();
        true
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
    F: Fn() -> Fut + Send + 'static,
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
    S: Clone + Send + 'static,
    F: Fn(S) -> Fut + Send + 'static,
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
    F: Fn(TaskContext) -> Fut + Send + 'static,
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
}

impl<Fut> Reuse for Once<Fut>
where
    Fut: Future<Output: TaskOutput> + Send + 'static,
{
    type Content = Fut;

    fn filled(future: Fut) -> Self {
        Self {
            future: Some(future),
        }
    }
}

impl<Fut> Body for Once<Fut>
where
    Fut: Future<Output: TaskOutput> + Send + 'static,
{
    fn poll(
        self: Pin<&mut Self>,
        _: Option<&TaskContext>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), TaskError>> {
        let mut this = self.project();
        let output = match this.future.as_mut().as_pin_mut() {
            Some(future) => ready!(future.poll(cx)),
            None => return Poll::Ready(Err(TaskError::fatal("its future is spent"))),
        };
        Poll::Ready(ended(output, || this.future.set(None)))
    }

    fn end(self: Pin<&mut Self>) {
        self.project().future.set(None);
    }

    fn about(&self) -> About {
        About {
            kind: Kind::Async,
            name: name::of::<Fut>,
        }
    }

    fn reusable(&self) -> bool {
        self.future.is_some()
    }

    fn empty(self: Pin<&mut Self>) -> Option<Shelf> {
        let mut this = self.project();
        if this.future.is_some() {
            this.future.set(None);
        }
        spent::is_kept::<Self>().then(Shelf::of::<Self>)
    }

    fn refill(self: Pin<&mut Self>, content: &mut dyn Any) -> bool {
        let Some(content) = content.downcast_mut::<Option<Fut>>() else {
            return false;
        };
        self.project().future.set(content.take());
        true
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

    fn about(&self) -> About {
        About {
            kind: Kind::Blocking,
            name: self.name,
        }
    }

    fn reusable(&self) -> bool {
        true
    }

    /// Its box is dropped: a thread costs more than that.
    fn empty(self: Pin<&mut Self>) -> Option<Shelf> {
        None
    }

    fn refill(self: Pin<&mut Self>, _: &mut dyn Any) -> bool {
        false
    }
}
