//! No framework: a tower service on hyper's own server, HTTP/1.1 and HTTP/2.
//!
//! ```text
//! cargo run --example hyper --features hyper,signal
//! curl -i http://127.0.0.1:3000/
//! curl -i --http2-prior-knowledge http://127.0.0.1:3000/
//! ```
//!
//! Each curl has its answer before the log says `task at work`. A path other than `/` is answered 404:
//! then the same task is skipped.
//!
//! `PORT=8080` listens elsewhere, `PORT=0` on any free port.

mod common;

use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use tower::ServiceBuilder;
use tower_defer::{DeferLayer, RequestExt, Shutdown, Task};

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let version = request.version();
    let mut response = Response::new(Full::from("hello\n"));
    match request.defer() {
        Ok(defer) => {
            let task = Task::new(move || async move {
                tracing::info!(?version, "task at work");
            });
            defer.run(task.name("after-the-answer"));
        }
        // The layer is missing; the text names the line to add.
        Err(missing) => {
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            *response.body_mut() = Full::from(missing.to_string());
        }
    }
    if request.uri().path() != "/" {
        *response.status_mut() = StatusCode::NOT_FOUND;
        *response.body_mut() = Full::from("not here\n");
    }
    tracing::info!(status = response.status().as_u16(), "handler returns");
    Ok(response)
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    common::show_tasks();
    let defer = DeferLayer::new();
    let service = ServiceBuilder::new()
        .layer(defer.clone())
        .service_fn(answer);
    let listener = common::listen(
        3000,
        &[
            "curl -i http://ADDRESS/",
            "curl -i --http2-prior-knowledge http://ADDRESS/",
            "curl -i http://ADDRESS/nowhere",
        ],
    )
    .await?;
    let report = Shutdown::new(&defer)
        .serve(tower_defer::signal(), |stop| {
            tower_defer::hyper::serve(listener, service, stop)
        })
        .await?;
    println!("{report}");
    Ok(())
}
