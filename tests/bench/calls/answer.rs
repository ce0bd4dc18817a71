//! An instance: answers every request with its number, `__answer FOLDER SLOW`. A POST's path is written to a file of
//! the folder before it is answered, so that what was done twice, or done and not answered, can be told. The instance
//! with the ordinal SLOW takes ten times as long.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// What it takes to answer, in the service where one is slow.
const NORMAL: Duration = Duration::from_millis(5);
const SLOW: Duration = Duration::from_millis(55);
const HEAD_BYTES_MAX: usize = 16 * 1024;

#[derive(Debug)]
struct Instance {
    name: String,
    takes: Duration,
    posts: File,
}

pub(crate) fn answer() -> anyhow::Result<()> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let folder = std::env::args().nth(2).context("a folder")?;
    let takes = match std::env::args().nth(3) {
        None => Duration::ZERO,
        Some(slow) if slow == variable("NAVE_ORDINAL")? => SLOW,
        Some(_) => NORMAL,
    };
    let name = variable("NAVE_INSTANCE")?;
    let file = Path::new(&folder).join(format!("{name}-{}", std::process::id()));
    let posts = OpenOptions::new().create(true).append(true).open(file)?;
    let port: u16 = variable("PORT")?.parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(port, Arc::new(Instance { name, takes, posts })))
}

async fn serve(port: u16, instance: Arc<Instance>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        let instance = instance.clone();
        connections.spawn(async move {
            // Whoever goes may.
            let _gone = converse(stream, &instance).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn converse(mut stream: TcpStream, instance: &Instance) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    loop {
        let Some((line, length)) = request(&buffer) else {
            if stream.read_buf(&mut buffer).await? == 0 || buffer.len() > HEAD_BYTES_MAX {
                return Ok(());
            }
            continue;
        };
        buffer.drain(..length);
        if let Some(path) = line.strip_prefix("POST ") {
            (&instance.posts).write_all(format!("{path}\n").as_bytes())?;
        }
        // A check of its health is answered at once: it is slow, not ill.
        if instance.takes > Duration::ZERO && line != "GET /ready" {
            sleep(instance.takes).await;
        }
        let name = &instance.name;
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{name}", name.len());
        stream.write_all(answer.as_bytes()).await?;
    }
}

/// Method and path of the first request and its whole length, once all of it is there.
fn request(bytes: &[u8]) -> Option<(String, usize)> {
    let head = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&bytes[..head]);
    let mut lines = text.lines();
    let mut words = lines.next().unwrap_or_default().split(' ');
    let line = [words.next().unwrap_or_default(), words.next().unwrap_or_default()].join(" ");
    let body: usize = lines.find_map(super::generator::length).unwrap_or(0);
    (bytes.len() >= head + body).then_some((line, head + body))
}
