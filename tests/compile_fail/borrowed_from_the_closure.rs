use tower_defer::Defer;

async fn welcome(name: &str) {
    println!("{name}");
}

fn handler(defer: &Defer, name: String) {
    defer.run(move || welcome(&name));
}

fn main() {}
