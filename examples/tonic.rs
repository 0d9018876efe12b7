//! gRPC: the same layer on tonic's server, a unary and a server-streaming method.
//!
//! ```text
//! cargo run --example tonic --features tonic,signal
//! cargo run --example tonic --features tonic,signal -- client
//! ```
//!
//! The second line is the client. It says `Greet` with a name (a task runs), `Greet` without one (an
//! error that is gRPC's and not HTTP's: the task is skipped, the one for failures runs), and `Count`,
//! whose task starts only when the last message and the trailers are out.
//!
//! The messages and the service are written by hand, so that no build needs protoc; the code that
//! tonic-build makes goes into `add_service` the same way.
//!
//! `PORT=8080` listens elsewhere, `PORT=0` on any free port; the client reads `PORT`, too.

mod common;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use http::uri::PathAndQuery;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::server::{Grpc, NamedService};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};
use tower_defer::tonic::RequestExt;
use tower_defer::{DeferLayer, Shutdown, Task, When};

const DEFAULT_PORT: u16 = 50051;
const GREET: &str = "/example.Greeter/Greet";
const COUNT: &str = "/example.Greeter/Count";

#[derive(Clone, PartialEq, prost::Message)]
struct Name {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Greeting {
    #[prost(string, tag = "1")]
    text: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Number {
    #[prost(uint32, tag = "1")]
    value: u32,
}

async fn greet(request: Request<Name>) -> Result<Response<Greeting>, Status> {
    let defer = request.defer()?; // an error becomes a `Status` that names the missing line
    let name = request.into_inner().name;
    defer.run(Task::new(|| remember("greeted")).name("on-success"));
    defer.run(
        Task::new(|| remember("refused"))
            .name("on-failure")
            .when(When::failure()),
    );
    if name.is_empty() {
        return Err(Status::invalid_argument("who?"));
    }
    let text = format!("hello {name}");
    Ok(Response::new(Greeting { text }))
}

async fn count(
    request: Request<Number>,
) -> Result<Response<BoxStream<'static, Result<Number, Status>>>, Status> {
    let defer = request.defer()?;
    defer.run(Task::new(|| remember("counted")).name("after-the-stream"));
    let numbers = stream::iter(1..=request.into_inner().value).then(|value| async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        tracing::info!(value, "message yielded");
        Ok(Number { value })
    });
    Ok(Response::new(numbers.boxed()))
}

async fn remember(what: &str) {
    tracing::info!(what, "task at work");
}

async fn serve() -> Result<(), Box<dyn std::error::Error>> {
    common::show_tasks();
    let defer = DeferLayer::new();
    let listener = common::listen(
        DEFAULT_PORT,
        &["cargo run --example tonic --features tonic,signal -- client"],
    )
    .await?;
    let server = Server::builder()
        .layer(defer.clone()) // the first layer is the outermost one
        .add_service(Greeter);
    let report = Shutdown::new(&defer)
        .serve(tower_defer::signal(), |stop| {
            server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop)
        })
        .await?;
    println!("{report}");
    Ok(())
}

async fn client() -> Result<(), Box<dyn std::error::Error>> {
    let address = format!("http://127.0.0.1:{}", common::port(DEFAULT_PORT));
    let channel = Endpoint::from_shared(address)?.connect().await?;
    let mut grpc = tonic::client::Grpc::new(channel);
    for name in ["ada", ""] {
        grpc.ready().await?;
        let name = Request::new(Name { name: name.into() });
        let path = PathAndQuery::from_static(GREET);
        let codec = ProstCodec::<Name, Greeting>::default();
        match grpc.unary(name, path, codec).await {
            Ok(greeting) => println!("Greet: {}", greeting.into_inner().text),
            Err(status) => println!("Greet: {:?}: {}", status.code(), status.message()),
        }
    }
    grpc.ready().await?;
    let up_to = Request::new(Number { value: 3 });
    let path = PathAndQuery::from_static(COUNT);
    let codec = ProstCodec::<Number, Number>::default();
    let mut numbers = grpc
        .server_streaming(up_to, path, codec)
        .await?
        .into_inner();
    while let Some(number) = numbers.message().await? {
        println!("Count: {}", number.value);
    }
    println!("Count: end");
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    match std::env::args().nth(1).as_deref() {
        None => serve().await,
        Some("client") => client().await,
        Some(other) => Err(format!("`{other}`? It is `client`, or nothing").into()),
    }
}

// What tonic-build would write.

#[derive(Clone)]
struct Greeter;

impl NamedService for Greeter {
    const NAME: &'static str = "example.Greeter";
}

impl Service<http::Request<tonic::body::Body>> for Greeter {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(async move {
            Ok(match request.uri().path() {
                GREET => {
                    let mut grpc = Grpc::new(ProstCodec::<Greeting, Name>::default());
                    grpc.unary(service_fn(greet), request).await
                }
                COUNT => {
                    let mut grpc = Grpc::new(ProstCodec::<Number, Number>::default());
                    grpc.server_streaming(service_fn(count), request).await
                }
                _ => Status::unimplemented("no such method").into_http(),
            })
        })
    }
}
