//! The load: a call each so many microseconds, whatever has become of those before. A call takes a connection that waits
//! or opens one, and is made once: what a careful client would repeat is counted as failed here.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use nave_tests::wait::pause;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::{Instant, timeout};

/// Every so many calls is a POST.
const POSTS: u64 = 10;
/// Much longer than anything that happens.
const PATIENCE: Duration = Duration::from_secs(30);
/// Of a connection that waits for its next call: below what servers allow, as good clients have it.
const IDLE: Duration = Duration::from_secs(1);

/// What became of one.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) number: u64,
    pub(super) is_post: bool,
    pub(super) took: Duration,
    /// Who answered.
    pub(super) answer: Result<String, Failed>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failed {
    /// Nobody took the connection.
    Refused(String),
    /// It ended, or nothing came, before the answer was whole.
    Cut(String),
    /// Another answer than 200, as a number and its text.
    Status(u16, String),
}

/// Calls that go on until they are stopped.
#[derive(Debug)]
pub(super) struct Generator {
    shared: Arc<Shared>,
    scheduling: JoinHandle<()>,
    runtime: Runtime,
}

#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    waiting: Mutex<Vec<(TcpStream, Instant)>>,
    done: Mutex<Vec<Call>>,
    under_way: AtomicUsize,
    over: AtomicBool,
}

impl Generator {
    pub(super) fn start(address: SocketAddr, per_second: u32) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let shared = Arc::new(Shared {
            address,
            waiting: Mutex::default(),
            done: Mutex::default(),
            under_way: AtomicUsize::default(),
            over: AtomicBool::default(),
        });
        let (begun, handle) = (shared.clone(), runtime.handle().clone());
        let scheduling = std::thread::spawn(move || {
            let (begin, gap) = (Instant::now(), Duration::from_secs(1) / per_second);
            let mut due = begin;
            for number in 0_u64.. {
                // Those that are late because this thread was not run are made at once.
                pause(due.saturating_duration_since(Instant::now()));
                if begun.over.load(Relaxed) {
                    return;
                }
                begun.under_way.fetch_add(1, Relaxed);
                // Owned by the runtime, which ends after the last.
                drop(handle.spawn(begun.clone().call(number, due)));
                due += gap;
            }
        });
        Ok(Self { shared, scheduling, runtime })
    }

    /// How many calls have ended.
    pub(super) fn ended(&self) -> usize {
        self.shared.done.lock().len()
    }

    /// Makes no new calls, and waits for those that are under way.
    pub(super) fn stop(self) -> Vec<Call> {
        self.shared.over.store(true, Relaxed);
        self.scheduling.join().expect("it does not panic");
        while self.shared.under_way.load(Relaxed) > 0 {
            pause(Duration::from_millis(1));
        }
        self.runtime.shutdown_background();
        std::mem::take(&mut *self.shared.done.lock())
    }
}

impl Shared {
    async fn call(self: Arc<Self>, number: u64, due: Instant) {
        let is_post = number % POSTS == POSTS - 1;
        let asked = timeout(PATIENCE, self.ask(number, is_post)).await;
        let answer = asked.unwrap_or_else(|_| Err(Failed::Cut(format!("nothing for {PATIENCE:?}"))));
        let took = due.elapsed();
        self.done.lock().push(Call { number, is_post, took, answer });
        self.under_way.fetch_sub(1, Relaxed);
    }

    async fn ask(&self, number: u64, is_post: bool) -> Result<String, Failed> {
        let mut stream = match self.waiting() {
            Some(stream) => stream,
            None => self.connect().await.map_err(|error| Failed::Refused(error.to_string()))?,
        };
        let cut = |error: std::io::Error| Failed::Cut(error.to_string());
        let request = match is_post {
            true => {
                format!("POST /{number} HTTP/1.1\r\nHost: calls\r\nContent-Length: 4\r\n\r\nbody")
            }
            false => format!("GET /{number} HTTP/1.1\r\nHost: calls\r\n\r\n"),
        };
        stream.write_all(request.as_bytes()).await.map_err(cut)?;
        let answer = read(&mut stream).await.map_err(cut)?;
        if !answer.closes {
            self.waiting.lock().push((stream, Instant::now()));
        }
        match answer.status {
            200 => Ok(answer.body),
            status => Err(Failed::Status(status, answer.body)),
        }
    }

    async fn connect(&self) -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// The newest that waits, unless its other end has closed it.
    fn waiting(&self) -> Option<TcpStream> {
        let mut waiting = self.waiting.lock();
        while let Some((stream, since)) = waiting.pop() {
            if since.elapsed() > IDLE {
                waiting.clear();
                return None;
            }
            let quiet = stream.try_read(&mut [0]);
            if quiet.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock) {
                return Some(stream);
            }
        }
        None
    }
}

struct Answer {
    status: u16,
    closes: bool,
    body: String,
}

async fn read(stream: &mut TcpStream) -> std::io::Result<Answer> {
    let mut bytes = Vec::with_capacity(1024);
    loop {
        if let Some(answer) = parse(&bytes) {
            return Ok(answer);
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            let text = if bytes.is_empty() { "closed without an answer" } else { "closed within an answer" };
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, text));
        }
    }
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let head = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&bytes[..head]).ok()?;
    let status = text.split(' ').nth(1)?.parse().ok()?;
    let length = text.lines().find_map(length)?;
    let body = bytes.get(head..head + length)?;
    let closes = text.lines().any(|line| line.eq_ignore_ascii_case("connection: close"));
    Some(Answer { status, closes, body: String::from_utf8_lossy(body).into_owned() })
}

/// Of a header line that says the body's length.
pub(super) fn length(line: &str) -> Option<usize> {
    let (name, value) = line.split_once(':')?;
    name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok()).flatten()
}
