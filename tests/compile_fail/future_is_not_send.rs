use std::rc::Rc;

use tower_defer::Defer;

async fn work() {}

fn handler(defer: &Defer) {
    defer.run(|| async {
        let user = Rc::new(7);
        work().await;
        println!("{user}");
    });
}

fn main() {}
