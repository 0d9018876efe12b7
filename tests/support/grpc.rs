//! A gRPC service and its client, written by hand: what a generator would write, and no more.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use http::uri::PathAndQuery;
use http::{Request, Response};
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};
use tower_defer::tonic::RequestExt;

use super::ran::Ran;
use super::{Gate, Log, soon};

pub(crate) const UNARY: &str = "/test.Echo/Unary";
pub(crate) const STREAM: &str = "/test.Echo/Stream";

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Ask {
    /// What to do: see [`Echo`].
    #[prost(string, tag = "1")]
    pub(crate) what: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Reply {
    #[prost(string, tag = "1")]
    pub(crate) text: String,
}

/// Registers the six tasks (for `witness`, one of that name) and does what it is asked:
///
/// - `well`, `witness`: answers (a stream: twice);
/// - `fail`: answers with status 13;
/// - `fail-late` (streams): answers once, and ends with status 13;
/// - `wait` (streams): answers once, and again when the gate is open;
/// - `never`: is pending (a stream: after its first answer).
#[derive(Clone, Debug)]
pub(crate) struct Echo {
    pub(crate) ran: Ran,
    pub(crate) log: Log,
    pub(crate) gate: Gate,
}

impl Echo {
    pub(crate) fn new() -> Self {
        Self {
            ran: Ran::new(),
            log: Log::new(),
            gate: Gate::new(),
        }
    }

    async fn unary(self, request: tonic::Request<Ask>) -> Result<tonic::Response<Reply>, Status> {
        self.register(&request)?;
        match request.get_ref().what.as_str() {
            "fail" => Err(Status::internal("asked to fail")),
            "never" => std::future::pending().await,
            _ => Ok(tonic::Response::new(reply("once"))),
        }
    }

    async fn stream(
        self,
        request: tonic::Request<Ask>,
    ) -> Result<tonic::Response<BoxStream<'static, Result<Reply, Status>>>, Status> {
        self.register(&request)?;
        let gate = self.gate.clone();
        let first = stream::iter([Ok(reply("once"))]);
        let then = match request.get_ref().what.as_str() {
            "fail" => return Err(Status::internal("asked to fail")),
            "fail-late" => stream::iter([Err(Status::internal("asked to fail"))]).boxed(),
            "never" => stream::pending().boxed(),
            "wait" => stream::once(async move {
                gate.passed().await;
                Ok(reply("twice"))
            })
            .boxed(),
            _ => stream::iter([Ok(reply("twice"))]).boxed(),
        };
        Ok(tonic::Response::new(first.chain(then).boxed()))
    }

    fn register(&self, request: &tonic::Request<Ask>) -> Result<(), Status> {
        let defer = request.defer()?;
        match request.get_ref().what.as_str() {
            "witness" => drop(defer.run(self.ran.task("witness"))),
            _ => self.ran.six(&defer),
        }
        self.log.note("registered");
        Ok(())
    }
}

fn reply(text: &str) -> Reply {
    Reply {
        text: text.to_owned(),
    }
}

impl NamedService for Echo {
    const NAME: &'static str = "test.Echo";
}

impl Service<Request<Body>> for Echo {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let echo = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<Reply, Ask>::default());
            Ok(match request.uri().path() {
                UNARY => {
                    let method = service_fn(move |request| echo.clone().unary(request));
                    grpc.unary(method, request).await
                }
                STREAM => {
                    let method = service_fn(move |request| echo.clone().stream(request));
                    grpc.server_streaming(method, request).await
                }
                _ => Status::new(Code::Unimplemented, "no such method").into_http(),
            })
        })
    }
}

/// tonic's own client.
#[derive(Clone)]
pub(crate) struct EchoClient(tonic::client::Grpc<Channel>);

impl EchoClient {
    pub(crate) async fn connect(addr: SocketAddr) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{addr}")).expect("an address");
        let channel = soon("a connection", endpoint.connect()).await;
        Self(tonic::client::Grpc::new(channel.expect("a connection")))
    }

    pub(crate) async fn unary(&mut self, what: &str) -> Result<String, Status> {
        let path = PathAndQuery::from_static(UNARY);
        self.0.ready().await.expect("a connection");
        let codec = ProstCodec::<Ask, Reply>::default();
        let called = self.0.unary(ask(what), path, codec);
        let reply = soon("an answer", called).await?;
        Ok(reply.into_inner().text)
    }

    pub(crate) async fn stream(&mut self, what: &str) -> Result<Streaming<Reply>, Status> {
        let path = PathAndQuery::from_static(STREAM);
        self.0.ready().await.expect("a connection");
        let codec = ProstCodec::<Ask, Reply>::default();
        let called = self.0.server_streaming(ask(what), path, codec);
        Ok(soon("a stream", called).await?.into_inner())
    }
}

fn ask(what: &str) -> tonic::Request<Ask> {
    tonic::Request::new(Ask {
        what: what.to_owned(),
    })
}

/// Reads a stream to its end: its texts, and the status that ended it.
pub(crate) async fn all(mut stream: Streaming<Reply>) -> (String, Code) {
    let mut texts = Vec::new();
    loop {
        match soon("a message", stream.message()).await {
            Ok(Some(reply)) => texts.push(reply.text),
            Ok(None) => return (texts.join(" "), Code::Ok),
            Err(status) => return (texts.join(" "), status.code()),
        }
    }
}
