use tower_defer::Defer;

struct NotAnError;

fn handler(defer: &Defer) {
    defer.run(|| async { Err::<(), NotAnError>(NotAnError) });
}

fn main() {}
