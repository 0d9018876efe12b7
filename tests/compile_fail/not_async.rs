use tower_defer::Defer;

fn handler(defer: &Defer) {
    defer.run(|| println!("hello"));
}

fn main() {}
