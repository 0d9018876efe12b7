//! Events: one fact, many independent subscribers.
//!
//! A handler says what has happened ([`Defer::emit`](crate::Defer::emit)) and knows nobody who cares.
//! Where the application is put together, functions subscribe to it ([`Events::on`]). Each of them gets
//! its own *delivery*: its own attempts, backoff, dead letter and replay; they run in parallel, and a
//! failing one is invisible to the others.
//!
//! Without a store, deliveries are tasks: they live in this process. With one ([`Events::store`]) the
//! events of a request are recorded **before the client sees the answer**, in one commit, and every
//! subscriber has each of them at least once, through crashes and restarts. The handler is the same.
//!
//! # Examples
//!
//! ```
//! use serde::{Deserialize, Serialize};
//! use tower_defer::{DeferLayer, TaskError};
//! use tower_defer::event::{Event, Events};
//!
//! #[derive(Clone, Serialize, Deserialize)]
//! struct UserCreated { id: i64, email: String }
//! impl Event for UserCreated { const NAME: &'static str = "user.created"; }
//!
//! # #[derive(Clone)] struct App;
//! async fn welcome_email(app: App, event: UserCreated) -> Result<(), TaskError> { Ok(()) }
//! async fn start_trial(app: App, event: UserCreated) -> Result<(), TaskError> { Ok(()) }
//!
//! # let app_state = App;
//! let events = Events::new(app_state)
//!     .on("welcome-email", welcome_email)
//!     .on("start-trial", start_trial);
//! let layer = DeferLayer::new().events(events);
//! # let _ = layer;
//! ```
//!
//! # The way of an event
//!
//! [`emit`](crate::Defer::emit) writes it as JSON and puts it into the request's outbox
//! (`outgoing`). When the handler has returned, its batch is recorded (`recording`), and the
//! response goes on. At the release its deliveries start, from memory while there is `room`, else the
//! `courier` claims them from the store when there is. The executor runs each attempt and tells the
//! `claim` how it ended; the `settler` writes that down, many at a time.

mod claim;
mod context;
mod courier;
mod emissions;
mod emit;
mod emitted;
mod events;
mod hub;
mod letters;
mod outgoing;
mod recording;
mod room;
mod settler;
pub mod store;
mod subscriber;
mod table;

pub use self::context::DeliveryContext;
pub use self::emissions::Emissions;
pub use self::emit::{Emit, IntoEmit};
pub use self::emitted::{EmitError, Emitted, Recorded};
pub use self::events::{Events, Unheard};
pub use self::letters::{DeliveryLetters, ReplayLetters};
pub use self::subscriber::{IntoSubscriber, Subscriber};

pub(crate) use self::hub::{Hub, Prepared};
pub(crate) use self::outgoing::{Holder, Outgoing};
pub(crate) use self::recording::Recording;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A fact: something that has happened, as data.
///
/// With a store it is kept as JSON, so what is read back is what was written: a field that serde skips
/// is gone, also where nothing crashed.
///
/// # Examples
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use tower_defer::event::Event;
///
/// #[derive(Clone, Serialize, Deserialize)]
/// struct OrderPaid { order: i64, #[serde(default)] coupon: Option<String> }
///
/// impl Event for OrderPaid {
///     const NAME: &'static str = "order.paid";
///     // It was called so before: what a store still has under that name is delivered, too.
///     const ALIASES: &'static [&'static str] = &["order.payed"];
/// }
/// ```
pub trait Event: Clone + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// What it is called in the store, in logs and in metrics: stable, whatever the type is called.
    const NAME: &'static str;

    /// What it was called before.
    const ALIASES: &'static [&'static str] = &[];
}
