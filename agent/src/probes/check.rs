//! One look at a process: does it answer? Each failure is a short phrase for people that does not name the probe.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use regex::Regex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::command::ServiceCommand;
use crate::logs::source::LinesSince;

/// A status line is far shorter; what is longer is not HTTP.
const STATUS_LINE_BYTES_MAX: usize = 1024;

/// What to look at.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Check {
    Http { port: u16, path: String },
    Tcp { port: u16 },
    Grpc { port: u16 },
    Exec(ServiceCommand),
    Log(LogCheck),
}

/// A line of output that says it.
#[derive(Debug, Clone)]
pub(crate) struct LogCheck {
    pub(crate) pattern: Regex,
    pub(crate) lines: Arc<parking_lot::Mutex<LinesSince>>,
}

impl PartialEq for LogCheck {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.lines, &other.lines)
    }
}

impl LogCheck {
    /// Looks at what was written since the last look; once there was such a line, it has been there.
    async fn run(&self) -> Result<(), String> {
        let (lines, pattern) = (self.lines.clone(), self.pattern.clone());
        let looked = tokio::task::spawn_blocking(move || lines.lock().any(|line| pattern.is_match(line)));
        match looked.await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err("no such line yet".to_owned()),
            Ok(Err(error)) => Err(format!("its output cannot be read: {error}")),
            Err(_) => Err("the agent is ending".to_owned()),
        }
    }
}

impl Check {
    /// Looks once. `Err` says why not.
    pub(crate) async fn run(&self, timeout: Duration) -> Result<(), String> {
        let look = async {
            match self {
                Self::Http { port, path } => http(*port, path).await,
                Self::Tcp { port } => connect(*port).await.map(drop),
                Self::Grpc { port } => grpc(*port, timeout).await,
                Self::Exec(exec) => exec.run().await,
                Self::Log(log) => log.run().await,
            }
        };
        tokio::time::timeout(timeout, look)
            .await
            .unwrap_or_else(|_| Err(format!("no answer in {}", Millis(timeout))))
    }
}

/// A duration as manifests write it.
struct Millis(Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            ms if ms % 1000 == 0 => write!(f, "{} s", ms / 1000),
            ms => write!(f, "{ms} ms"),
        }
    }
}

async fn connect(port: u16) -> Result<TcpStream, String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpStream::connect(address).await.map_err(|e| match e.kind() {
        io::ErrorKind::ConnectionRefused => format!("connection refused: nothing listens on {address}"),
        _ => format!("cannot connect to {address}: {e}"),
    })
}

async fn http(port: u16, path: &str) -> Result<(), String> {
    let mut stream = connect(port).await?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: nave-probe/{}\r\nAccept: */*\r\nConnection: close\r\n\r\n",
        env!("CARGO_PKG_VERSION")
    );
    let broken = |e: io::Error| format!("the connection broke before an answer: {e}");
    stream.write_all(request.as_bytes()).await.map_err(broken)?;
    let mut answer = Vec::new();
    let mut buffer = [0; 256];
    while !answer.contains(&b'\n') && answer.len() < STATUS_LINE_BYTES_MAX {
        match stream.read(&mut buffer).await.map_err(broken)? {
            0 => break,
            length => answer.extend_from_slice(&buffer[..length]),
        }
    }
    judge_status_line(&answer)
}

/// `HTTP/1.1 200 OK`: 200 to 399 is good.
fn judge_status_line(answer: &[u8]) -> Result<(), String> {
    if answer.is_empty() {
        return Err("the connection was closed without an answer".to_owned());
    }
    let line = answer.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let (protocol, rest) = line.trim_end().split_once(' ').unwrap_or_default();
    let status = rest.get(..3).and_then(|digits| digits.parse::<u16>().ok());
    match status.filter(|_| protocol.starts_with("HTTP/1.")) {
        Some(200..=399) => Ok(()),
        Some(_) => Err(format!("status {}", rest.trim())),
        None => Err("the answer is not HTTP/1".to_owned()),
    }
}

async fn grpc(port: u16, timeout: Duration) -> Result<(), String> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{port}"))
        .map_err(|e| e.to_string())?
        .connect_timeout(timeout);
    // A refused connection reads better from plain TCP.
    drop(connect(port).await?);
    let channel = endpoint.connect().await.map_err(|e| format!("no HTTP/2 connection: {e}"))?;
    let answer = HealthClient::new(channel)
        .check(HealthCheckRequest { service: String::new() })
        .await
        .map_err(|status| match status.code() {
            tonic::Code::Unimplemented => "it does not serve grpc.health.v1.Health".to_owned(),
            code => format!("grpc.health.v1 answered {code:?}: {}", status.message()),
        })?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        other => Err(format!("grpc.health.v1 says {}", other.as_str_name())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    const TIMEOUT: Duration = Duration::from_millis(500);

    /// A server that gives one answer to everybody; `None`: it never answers.
    async fn server(answer: Option<&'static str>) -> (u16, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut kept = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                match answer {
                    Some(answer) => {
                        let mut request = [0; 512];
                        assert_ne!(stream.read(&mut request).await.unwrap(), 0);
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                    None => kept.push(stream),
                }
            }
        });
        (port, tasks)
    }

    #[tokio::test]
    async fn http_failures_say_what_came_back() {
        for (answer, result) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Ok(())),
            ("HTTP/1.0 302 Found\r\n\r\n", Ok(())),
            ("HTTP/1.1 204\r\n\r\n", Ok(())),
            ("HTTP/1.1 503 Service Unavailable\r\n\r\n", Err("status 503 Service Unavailable")),
            ("HTTP/1.1 404 Not Found\r\n\r\n", Err("status 404 Not Found")),
            ("HTTP/1.1 100 Continue\r\n\r\n", Err("status 100 Continue")),
            ("SSH-2.0-OpenSSH_9.2\r\n", Err("the answer is not HTTP/1")),
            ("", Err("the connection was closed without an answer")),
        ] {
            let (port, _tasks) = server(Some(answer)).await;
            let check = Check::Http { port, path: "/".into() };
            assert_eq!(check.run(TIMEOUT).await, result.map_err(str::to_owned), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn silence_and_refusal_are_told_apart() {
        let (port, _tasks) = server(None).await;
        let check = Check::Http { port, path: "/".into() };
        assert_eq!(check.run(Duration::from_millis(50)).await.unwrap_err(), "no answer in 50 ms");
        assert_eq!(Check::Tcp { port }.run(TIMEOUT).await, Ok(()));
        let nobody = crate::nobody::Nobody::new();
        let free = nobody.address.port();
        for check in [
            Check::Tcp { port: free },
            Check::Http { port: free, path: "/".into() },
            Check::Grpc { port: free },
        ] {
            let said = check.run(TIMEOUT).await.unwrap_err();
            assert_eq!(said, format!("connection refused: nothing listens on 127.0.0.1:{free}"));
        }
    }

    #[tokio::test]
    async fn grpc_asks_the_standard_health_service() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (reporter, service) = tonic_health::server::health_reporter();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        let check = Check::Grpc { port };
        assert_eq!(check.run(TIMEOUT).await, Ok(()));
        reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        assert_eq!(check.run(TIMEOUT).await.unwrap_err(), "grpc.health.v1 says NOT_SERVING");
    }
}
