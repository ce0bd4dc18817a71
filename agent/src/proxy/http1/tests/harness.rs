//! A route with scripted endpoints behind it, and a caller in front.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::balancer::{BalancerSettings, EndpointKey, EndpointSpec, Reach};
use nave_agent_core::directory::{EndpointState, PortRules, Protocol};
use nave_proto::ids::InstanceId;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::nobody::Nobody;
use crate::proxy::http1::serve;
use crate::proxy::route::Route;

/// Nothing here takes longer on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Tasks that end with the test.
#[derive(Debug, Default)]
pub(super) struct Stage {
    tasks: JoinSet<()>,
    nobodies: Mutex<Vec<Nobody>>,
    /// The agent is ending.
    pub(super) ending: CancellationToken,
}

impl Stage {
    /// An endpoint: what it does with each connection, which are numbered from 0.
    pub(super) async fn endpoint<F, Fut>(&mut self, act: F) -> SocketAddr
    where
        F: Fn(usize, TcpStream) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), act)
    }

    /// The same for a listener that is there already.
    pub(super) fn serve<F, Fut>(&mut self, listener: TcpListener, act: F) -> SocketAddr
    where
        F: Fn(usize, TcpStream) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let address = listener.local_addr().unwrap();
        self.tasks.spawn(async move {
            let mut connections = JoinSet::new();
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(act(number, stream));
            }
        });
        address
    }

    /// One that answers each request on a connection with these bytes.
    pub(super) async fn answering(&mut self, answer: &'static str) -> SocketAddr {
        self.endpoint(move |_, mut stream| async move {
            while read_head(&mut stream).await.is_some() {
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        })
        .await
    }

    /// Nobody listens there.
    pub(super) fn nobody(&self) -> SocketAddr {
        let nobody = Nobody::new();
        let address = nobody.address;
        self.nobodies.lock().push(nobody);
        address
    }

    /// A caller's connection to a route with these endpoints, in whatever order the balancer asks them.
    pub(super) async fn call(&mut self, endpoints: &[SocketAddr], rules: PortRules) -> Caller {
        let route =
            Route::new("web".into(), "http".into(), Protocol::Http, rules, BalancerSettings::default());
        let specs = endpoints.iter().zip(0_u8..).map(|(address, number)| EndpointSpec {
            key: EndpointKey { instance: InstanceId(number.into()), epoch: 1 },
            reach: Reach::Local(*address),
            state: EndpointState::Ready,
            weight: 1,
        });
        route.update(specs.collect());
        let route = Arc::new(route);
        self.call_route(&route).await
    }

    pub(super) async fn call_route(&mut self, route: &Arc<Route>) -> Caller {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (far, _) = far.unwrap();
        self.tasks.spawn(serve(
            route.clone(),
            far,
            crate::proxy::route::Caller::Unknown,
            self.ending.clone(),
        ));
        Caller { stream: near.unwrap(), route: route.clone() }
    }
}

/// A listener that has room for two connections which nobody accepts; a third is made to wait.
pub(super) fn narrow() -> TcpListener {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    socket.listen(1).unwrap()
}

/// Connections that take all the room of [`narrow`].
pub(super) async fn crowd(address: SocketAddr) -> [TcpStream; 2] {
    [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()]
}

/// A request's head, without whatever is behind it.
pub(super) async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

#[derive(Debug)]
pub(super) struct Caller {
    pub(super) stream: TcpStream,
    pub(super) route: Arc<Route>,
}

impl Caller {
    pub(super) async fn say(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// So many bytes.
    pub(super) async fn hear(&mut self, bytes: usize) -> String {
        let mut heard = vec![0; bytes];
        within(self.stream.read_exact(&mut heard)).await.unwrap();
        String::from_utf8(heard).unwrap()
    }

    pub(super) async fn hear_head(&mut self) -> String {
        within(read_head(&mut self.stream)).await.expect("the connection ended before a head")
    }

    /// Everything up to the end of the connection.
    pub(super) async fn hear_all(&mut self) -> String {
        let mut heard = Vec::new();
        within(self.stream.read_to_end(&mut heard)).await.unwrap();
        String::from_utf8(heard).unwrap()
    }

    /// Sends a request, and hears all there is to its end; it must ask for the connection to be closed.
    pub(super) async fn ask(&mut self, text: &str) -> String {
        self.say(text).await;
        self.hear_all().await
    }
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes longer than 30 s")
}
