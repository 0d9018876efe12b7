//! How a task says that it failed, and whether another try is worth it.

use std::any::Any;
use std::cell::RefCell;
use std::fmt::{self, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::sync::Arc;

/// What kind of failure an attempt ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Worth another try.
    Plain,
    /// The user's predicate said that it is not.
    NotRetryable,
    /// Not worth another try.
    Fatal,
    /// Worth another try after this long.
    RetryAfter(Duration),
    /// The attempt outlived its time.
    TimedOut,
    /// The task panicked.
    Panicked,
    /// What it was kept as cannot be read.
    Unreadable,
}

/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The error of a failed attempt.
///
/// It is made from any error by `?`, and then another try is worth it. [`fatal`](Self::fatal) and
/// [`retry_after`](Self::retry_after) say otherwise. Like `anyhow::Error`, and for the same reason (the
/// blanket conversion), it is not itself a [`std::error::Error`].
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tower_defer::TaskError;
///
/// # async fn post(_: u64) -> Result<u16, std::io::Error> { Ok(202) }
/// async fn webhook(user: u64) -> Result<(), TaskError> {
///     match post(user).await? {                                   // plain: tried again
///         200..=299 => Ok(()),
///         429 => Err(TaskError::retry_after(Duration::from_secs(30), "too many requests")),
///         400..=499 => Err(TaskError::fatal("the receiver refused it")),
///         _ => Err("the receiver is in trouble".into()),
///     }
/// }
/// ```
pub struct TaskError {
    class: Class,
    source: BoxError,
}

impl TaskError {
    /// An error after which another try is worth it.
    pub fn new(error: impl Into<BoxError>) -> Self {
        Self::with_class(Class::Plain, error.into())
    }

    /// An error after which no other try is worth it: the task becomes a dead letter at once.
    pub fn fatal(error: impl Into<BoxError>) -> Self {
        Self::with_class(Class::Fatal, error.into())
    }

    /// An error after which another try is worth it once `delay` has passed. The policy's delay is
    /// replaced, its [`max_attempts`](crate::Retry::exponential) and
    /// [`give_up_after`](crate::Retry::give_up_after) still hold.
    pub fn retry_after(delay: Duration, error: impl Into<BoxError>) -> Self {
        Self::with_class(Class::RetryAfter(delay), error.into())
    }

    /// Whether it was made by [`fatal`](Self::fatal).
    pub fn is_fatal(&self) -> bool {
        self.class == Class::Fatal
    }

    /// The error that it was made from.
    pub fn get_ref(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        &*self.source
    }

    /// An attempt could not begin: what the task was kept as cannot be read.
    #[cfg(feature = "events")]
    pub(crate) fn unreadable(error: impl Into<BoxError>) -> Self {
        Self::with_class(Class::Unreadable, error.into())
    }

    fn with_class(class: Class, source: BoxError) -> Self {
        Self { class, source }
    }

    pub(crate) fn class(&self) -> Class {
        self.class
    }
}

impl<E: Into<BoxError>> From<E> for TaskError {
    fn from(error: E) -> Self {
        Self::new(error)
    }
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl fmt::Debug for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskError")
            .field("class", &self.class)
            .field("source", &self.source)
            .finish()
    }
}

/// The longest error text that is kept, in bytes.
pub(crate) const TEXT_LIMIT: usize = 1024;

/// The `Display` of an error and of its causes, bounded, and never a panic: it is the user's code.
pub(crate) fn error_text(error: &(dyn std::error::Error + 'static)) -> Arc<str> {
    kept_text(|out| {
        write!(out, "{error}")?;
        let mut cause = error.source();
        // A chain longer than this is a circle.
        for _ in 0..16 {
            let Some(inner) = cause else { break };
            write!(out, ": {inner}")?;
            cause = inner.source();
        }
        Ok(())
    })
}

/// What a panic said.
pub(crate) fn panic_text(payload: Box<dyn Any + Send>) -> String {
    let text = payload
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(a panic without a text)");
    let text = bounded_text(|out| out.write_str(text));
    drop_payload(payload);
    text
}

/// The payload is the user's as well, and its drop may panic in its turn, with a payload whose drop
/// panics.
fn drop_payload(payload: Box<dyn Any + Send>) {
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        forget(again);
    }
}

#[expect(
    clippy::mem_forget,
    reason = "nobody can tell where a payload ends whose drop panics with another one"
)]
fn forget(payload: Box<dyn Any + Send>) {
    std::mem::forget(payload);
}

/// At most [`TEXT_LIMIT`] bytes of what `write` writes, cut between characters.
pub(crate) fn bounded_text(write: impl FnOnce(&mut Bounded<'_>) -> fmt::Result) -> String {
    let mut text = String::new();
    write_bounded(&mut text, write);
    text
}

/// As [`bounded_text`], for a text that is kept. Errors that come in herds say the same, and then they share
/// one text: that saves 283 of the 2,574 instructions of a task that fails, and its memory; where no two say
/// the same it costs 31.
pub(crate) fn kept_text(write: impl FnOnce(&mut Bounded<'_>) -> fmt::Result) -> Arc<str> {
    let mut write = Some(write);
    let kept = DESK.try_with(|desk| {
        let mut desk = desk.try_borrow_mut().ok()?;
        Some(desk.keep(write.take()?))
    });
    match (kept, write) {
        (Ok(Some(text)), _) => text,
        // Within the `Display` of another error, or at the end of the thread.
        (_, Some(write)) => bounded_text(write).into(),
        (_, None) => unreachable!("it is taken to be written"),
    }
}

thread_local! {
    static DESK: RefCell<Desk> = const {
        RefCell::new(Desk {
            draft: String::new(),
            last: None,
        })
    };
}

/// Where a thread writes texts, at most [`TEXT_LIMIT`] bytes each.
struct Desk {
    draft: String,
    /// The last one that was kept.
    last: Option<Arc<str>>,
}

impl Desk {
    fn keep(&mut self, write: impl FnOnce(&mut Bounded<'_>) -> fmt::Result) -> Arc<str> {
        self.draft.clear();
        write_bounded(&mut self.draft, write);
        match &self.last {
            Some(last) if **last == *self.draft => last.clone(),
            _ => {
                let text: Arc<str> = self.draft.as_str().into();
                self.last = Some(text.clone());
                text
            }
        }
    }
}

fn write_bounded(text: &mut String, write: impl FnOnce(&mut Bounded<'_>) -> fmt::Result) {
    let mut out = Bounded(text);
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| write(&mut out))) {
        say_that_it_panicked(text, payload);
    }
}

#[cold]
fn say_that_it_panicked(text: &mut String, payload: Box<dyn Any + Send>) {
    const SAID: &str = "(its Display panicked)";
    let mut end = text.len().min(TEXT_LIMIT - SAID.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text.push_str(SAID);
    drop_payload(payload);
}

/// A writer that refuses what goes beyond the limit, so that a huge `Display` stops early.
pub(crate) struct Bounded<'a>(&'a mut String);

impl fmt::Write for Bounded<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = TEXT_LIMIT.saturating_sub(self.0.len());
        if text.len() <= room {
            self.0.push_str(text);
            return Ok(());
        }
        let mut end = room;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.0.push_str(&text[..end]);
        Err(fmt::Error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Hostile;

    impl fmt::Display for Hostile {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("half ")?;
            panic!("in Display");
        }
    }

    impl std::error::Error for Hostile {}

    fn fails() -> Result<(), TaskError> {
        Err(std::io::Error::other("disk"))?;
        Ok(())
    }

    #[test]
    fn made_from_any_error_and_from_itself() {
        fn again() -> Result<(), TaskError> {
            fails()?;
            Ok(())
        }
        assert_eq!(again().map_err(|e| e.to_string()), Err("disk".to_owned()));
        assert!(TaskError::fatal("no").is_fatal());
        assert!(!TaskError::from("yes").is_fatal());
    }

    /// Its `Display` fails in its turn, and that is kept, too.
    #[derive(Debug)]
    struct Nested;

    impl fmt::Display for Nested {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "about {}", error_text(&std::io::Error::other("disk")))
        }
    }

    impl std::error::Error for Nested {}

    #[test]
    fn the_same_text_is_kept_once_and_another_one_by_itself() {
        let disk = || error_text(&std::io::Error::other("disk"));
        let (one, two) = (disk(), disk());
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!(&*error_text(&Nested), "about disk");
        let three = disk();
        assert_eq!((&*one, &*three), ("disk", "disk"));
    }

    #[test]
    fn texts_are_bounded_and_a_panicking_display_is_survived() {
        assert_eq!(&*error_text(&Hostile), "half (its Display panicked)");
        let long = bounded_text(|out| out.write_str(&"é".repeat(2000)));
        assert_eq!(long.len(), TEXT_LIMIT);
        let odd = bounded_text(|out| out.write_str(&format!("x{}", "é".repeat(2000))));
        assert_eq!(odd.len(), TEXT_LIMIT - 1);
        let long_panic = bounded_text(|out| {
            let _ = out.write_str(&"é".repeat(2000));
            panic!("after that");
        });
        assert_eq!(long_panic.len(), TEXT_LIMIT);
        assert!(long_panic.ends_with("é(its Display panicked)"));
    }
}
