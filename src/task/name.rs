//! What a task is called.

use std::borrow::Cow;
use std::hash::{Hash, Hasher};

use crate::sync::Arc;

/// A name that is cheap to clone: an attempt's record takes one.
#[derive(Clone, Debug)]
pub(crate) enum Name {
    /// That of the function that registered the task. Looked for only when someone reads it: the
    /// search was 297 of the 2,272 instructions of a task.
    Function(fn() -> &'static str),
    Static(&'static str),
    Shared(Arc<str>),
}

impl Name {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Name::Function(name) => name(),
            Name::Static(name) => name,
            Name::Shared(name) => name,
        }
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Name {}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl From<Cow<'static, str>> for Name {
    fn from(name: Cow<'static, str>) -> Self {
        match name {
            Cow::Borrowed(name) => Name::Static(name),
            Cow::Owned(name) => Name::Shared(name.into()),
        }
    }
}

#[cfg(feature = "events")]
impl From<Arc<str>> for Name {
    fn from(name: Arc<str>) -> Self {
        Name::Shared(name)
    }
}

/// The function that holds the closure or the future `F`.
pub(crate) fn of<F>() -> &'static str {
    of_closure(std::any::type_name::<F>())
}

/// The function that holds a closure: its type's name up to the closure.
///
/// `app::sign_up::{{closure}}::{{closure}}` is `app::sign_up`. A marker within `<…>` belongs to a type
/// argument and says nothing about where the closure stands.
fn of_closure(type_name: &'static str) -> &'static str {
    let mut depth = 0_usize;
    for (at, byte) in type_name.bytes().enumerate() {
        match byte {
            b'<' => depth += 1,
            b'>' => depth = depth.saturating_sub(1),
            b':' if depth == 0 && type_name[at..].starts_with("::{{closure}}") => {
                return &type_name[..at];
            }
            _ => {}
        }
    }
    type_name
}

#[cfg(test)]
mod tests {
    use super::of_closure;

    #[test]
    fn the_enclosing_function() {
        for (given, name) in [
            ("app::sign_up::{{closure}}::{{closure}}", "app::sign_up"),
            ("app::sign_up", "app::sign_up"),
            ("app::outer::{{closure}}::inner::{{closure}}", "app::outer"),
            (
                "app::make<app::other::{{closure}}>::{{closure}}",
                "app::make<app::other::{{closure}}>",
            ),
            (
                "<app::Api as app::Users>::create::{{closure}}",
                "<app::Api as app::Users>::create",
            ),
            ("app::é::{{closure}}", "app::é"),
        ] {
            assert_eq!(of_closure(given), name);
        }
    }
}
