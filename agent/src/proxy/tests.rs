//! The proxy as a caller sees it: addresses, restarts, conflicts, ends of endpoints.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};

use nave_agent_core::directory::{Endpoint, EndpointState, Port, PortRules, Protocol};

use super::*;

const OWN: HostId = HostId(1);

/// An endpoint that greets each connection with its number, then closes it.
fn greeter(number: u64) -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _caller_gone = stream.unwrap().write_all(&[u8::try_from(number).unwrap()]);
        }
    });
    Endpoint {
        instance: InstanceId(number),
        epoch: 1,
        ordinal: 0,
        host: OWN,
        ports: [("db".into(), port)].into(),
        state: EndpointState::Ready,
    }
}

fn service(service_port: u16, endpoints: &[&Endpoint]) -> Arc<Service> {
    let rules = PortRules { pending_timeout: Duration::from_millis(50), ..PortRules::default() };
    let port = Port { name: "db".into(), protocol: Protocol::Tcp, service_port, rules };
    let endpoints = endpoints.iter().copied().cloned().collect();
    Arc::new(Service { name: "db".into(), suffix: 7, ports: vec![port], allow: None, endpoints })
}

/// Tests that run at the same time do not meet.
fn prefix() -> [u8; 2] {
    [127, 100 + u8::try_from(std::process::id() % 100).unwrap()]
}

/// A port that nobody listens on, below those that the kernel gives away (32768 and up), so that nobody is given it
/// in the meantime.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let mut ports = std::iter::repeat_with(|| 6_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}

fn start(dir: &Path, shutdown: &CancellationToken) -> Proxy {
    let config = ProxyConfig {
        prefix: prefix(),
        own_host: OWN,
        workers: 2,
        ports_file: dir.join("proxy-ports"),
        singles_file: dir.join("proxy-singles"),
        routes: Routes::default(),
        records: Arc::default(),
        notes: Notes::default(),
        credentials: None,
        attest: ("box".to_owned(), Vec::new()),
    };
    Proxy::start(config, shutdown.clone()).unwrap()
}

/// Waits until nobody has the address. A child that another test has forked keeps this process's sockets up to its exec.
async fn until_free(address: SocketAddr) {
    let until = Instant::now() + Duration::from_secs(10);
    while TcpListener::bind(address).is_err() {
        assert!(Instant::now() < until, "somebody has {address}");
        tokio::task::yield_now().await;
    }
}

/// Who answers; `None`: the connection was closed without a word.
#[track_caller]
fn ask(address: SocketAddr) -> Option<u64> {
    let mut byte = [0];
    let mut stream = TcpStream::connect(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    stream.read_exact(&mut byte).ok().map(|()| u64::from(byte[0]))
}

#[tokio::test]
async fn one_that_is_gone_gets_nothing_from_the_moment_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let shutdown = CancellationToken::new();
    let proxy = start(dir.path(), &shutdown);
    let (first, second) = (greeter(1), greeter(2));
    proxy.put(service(free_port(), &[&first, &second]));
    assert!(proxy.addresses("db").is_empty(), "not before the keeper has said what it holds");
    proxy.shared.listeners.adopt(BTreeMap::new());
    let address = proxy.addresses("db")["db"];
    assert_eq!(address.ip().to_string(), format!("127.{}.0.7", prefix()[1]));
    let answers: BTreeSet<_> = (0..100).map(|_| ask(address)).collect();
    assert_eq!(answers, [Some(1), Some(2)].into());
    proxy.local_gone(InstanceId(1), 1);
    assert!((0..100).all(|_| ask(address) == Some(2)));
    proxy.local("db", InstanceId(2), 1, LocalWord::Draining);
    assert_eq!(ask(address), Some(2), "there is no other");
    proxy.local_gone(InstanceId(2), 1);
    assert_eq!(ask(address), None, "in bounded time");
    proxy.remove("db");
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).is_ok() {
        assert!(Instant::now() < until, "it still listens");
        tokio::task::yield_now().await;
    }
    shutdown.cancel();
    proxy.ended().await;
}

#[tokio::test]
async fn callers_that_come_between_two_agents_wait_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let shutdown = CancellationToken::new();
    let proxy = start(dir.path(), &shutdown);
    let endpoint = greeter(1);
    let service = service(free_port(), &[&endpoint]);
    proxy.put(service.clone());
    proxy.shared.listeners.adopt(BTreeMap::new());
    let address = proxy.addresses("db")["db"];
    let kept = proxy.shared.listeners.kept().unwrap();
    assert_eq!(kept.keys().collect::<Vec<_>>(), [&format!("proxy/{address}")]);
    shutdown.cancel();
    proxy.ended().await;
    let mut waiting = TcpStream::connect(address).unwrap();

    let shutdown = CancellationToken::new();
    let next = start(dir.path(), &shutdown);
    next.put(service);
    next.shared.listeners.adopt(kept);
    let mut byte = [0];
    waiting.read_exact(&mut byte).unwrap();
    drop(waiting);
    assert_eq!(next.addresses("db")["db"], address);
    assert_eq!(next.shared.listeners.kept().unwrap().len(), 1);
    shutdown.cancel();
    next.ended().await;
}

#[tokio::test]
async fn a_taken_address_has_a_stand_in_that_stays_until_the_right_one_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = greeter(1);
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut instead = BTreeSet::new();
    for _ in 0..2 {
        let shutdown = CancellationToken::new();
        let proxy = start(dir.path(), &shutdown);
        proxy.put(service(port, &[&endpoint]));
        proxy.shared.listeners.adopt(BTreeMap::new());
        let address = proxy.addresses("db")["db"];
        assert!((10_000..20_000).contains(&address.port()), "{address}");
        assert_eq!(ask(address), Some(1));
        instead.insert(address);
        shutdown.cancel();
        proxy.ended().await;
        drop(proxy);
        until_free(address).await;
    }
    assert_eq!(instead.len(), 1, "the same after a restart");
    let shutdown = CancellationToken::new();
    let proxy = start(dir.path(), &shutdown);
    proxy.put(service(port, &[&endpoint]));
    proxy.shared.listeners.adopt(BTreeMap::new());
    drop(taken);
    until_free(([0, 0, 0, 0], port).into()).await;
    proxy.shared.listeners.retry();
    let address = proxy.addresses("db")["db"];
    assert_eq!(address.port(), port);
    assert_eq!((ask(address), ask(*instead.first().unwrap())), (Some(1), Some(1)), "both serve");
    shutdown.cancel();
    proxy.ended().await;
}
