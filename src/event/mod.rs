//! Events: facts that are recorded before the client sees the answer, and delivered to every
//! subscriber on its own.
//!
//! Only the [`store`] is here yet: the contract, its in-memory reference, the embedded store and the
//! suite that holds them to their promises. Nothing emits events yet, and until something does, this
//! module may change in any release.

pub mod store;
