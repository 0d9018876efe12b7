//! Side effects that run after the response is really sent.
