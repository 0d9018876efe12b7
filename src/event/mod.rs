//! Events: facts that are recorded before the client sees the answer, and delivered to every
//! subscriber on its own.

pub mod store;
