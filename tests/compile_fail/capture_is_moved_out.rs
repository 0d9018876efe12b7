use tower_defer::Defer;

async fn welcome(name: String) {
    println!("{name}");
}

fn handler(defer: &Defer, name: String) {
    defer.run(move || async move { welcome(name).await });
}

fn main() {}
