//! The unit of deferred work: what is run, what it is called, when it applies, how it ends.
//!
//! A task is at most one allocation from its registration to its end ([`node`]): the closure, the
//! attempt's future and the link by which the collector and the queue chain it share a box, which the
//! next task of its kind uses again ([`spent`]).

mod body;
mod condition;
mod context;
mod id;
mod keeper;
mod list;
mod name;
mod node;
mod settings;
mod spent;

use body::Reuse;
pub use body::TaskOutput;
pub(crate) use body::{Body, Kind};
pub use condition::When;
pub use context::TaskContext;
pub(crate) use context::{Attempt, Follows, Origin};
pub use id::TaskId;
pub(crate) use id::{Marks, Sequence};
#[cfg(feature = "events")]
pub(crate) use keeper::Keeper;
pub(crate) use keeper::{Kept, Lent};
pub(crate) use list::{Fifo, Link};
pub(crate) use name::Name;
pub(crate) use node::Node;
pub use settings::AttemptRecord;
pub(crate) use settings::Settings;
pub use settings::{IntoTask, Task};
