use tower_defer::Defer;

fn handler(defer: &Defer) {
    defer.run(|| async { 17 });
}

fn main() {}
