use tower_defer::Defer;

async fn welcome(user: i64) {
    println!("{user}");
}

fn handler(defer: &Defer) {
    defer.run(welcome(17));
}

fn main() {}
