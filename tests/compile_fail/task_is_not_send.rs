use std::rc::Rc;

use tower_defer::Defer;

fn handler(defer: &Defer) {
    let user = Rc::new(7);
    defer.run(move || {
        let user = user.clone();
        async move { println!("{user}") }
    });
}

fn main() {}
