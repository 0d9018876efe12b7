//! .
mod support;
#[test]
fn x() {
    support::everywhere(|s| async move {
        let sv = s.serve(tower::service_fn(|_| async {
            Ok::<_, std::convert::Infallible>(http::Response::new(
                support::body::Script::new().data("hi"),
            ))
        }));
        let mut c = s.connect(&sv).await;
        let a = c.get("/").await;
        assert_eq!(&a.body[..], b"hi");
    });
}
