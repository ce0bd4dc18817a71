//! The load, and what came of it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::Instant;

/// How long each is measured.
pub(super) const LASTS: Duration = Duration::from_secs(8);
/// Readers of bytes at once.
const STREAMS: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    Http1,
    Http2,
    Tcp,
}

/// One run.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) per_second: f64,
    pub(super) half_ms: f64,
    pub(super) last_ms: f64,
    /// Millions of requests, or GiB.
    pub(super) units: f64,
}

impl Load {
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1.1, 64 connections kept alive, 1 KiB",
            Self::Http2 => "HTTP/2, 8 connections of 16 streams, 1 KiB",
            Self::Tcp => "TCP, 4 connections, bytes",
        }
    }

    /// As it is asked for.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Tcp => "tcp",
        }
    }

    pub(super) const fn rate(self) -> &'static str {
        if matches!(self, Self::Tcp) { "MiB/s" } else { "requests/s" }
    }

    pub(super) const fn per(self) -> &'static str {
        if matches!(self, Self::Tcp) { "for a GiB" } else { "for a million requests" }
    }

    pub(super) const fn service(self) -> &'static str {
        match self {
            Self::Http1 => "bench-http",
            Self::Http2 => "bench-http2",
            Self::Tcp => "bench-tcp",
        }
    }

    pub(super) fn run(self, port: u16, host: IpAddr, lasts: Duration) -> anyhow::Result<Measured> {
        match self {
            Self::Http1 => wrk(port, host, lasts),
            Self::Http2 => h2load(port, host, lasts),
            Self::Tcp => Ok(read_bytes(port, host, lasts)),
        }
    }
}

fn wrk(port: u16, host: IpAddr, lasts: Duration) -> anyhow::Result<Measured> {
    let seconds = lasts.as_secs();
    let output = Command::new("wrk")
        .args(["-t2", "-c64", "--latency", &format!("-d{seconds}s"), &format!("http://{host}:{port}/")])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        bail!("requests failed:\n{text}");
    }
    let field = |name: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(name));
        line.and_then(|line| line.split_whitespace().last()).with_context(|| format!("no {name} in:\n{text}"))
    };
    let per_second: f64 = field("Requests/sec:")?.parse()?;
    let units = per_second * lasts.as_secs_f64() / 1e6;
    Ok(Measured {
        per_second,
        half_ms: milliseconds(field("50%")?)?,
        last_ms: milliseconds(field("99%")?)?,
        units,
    })
}

/// wrk's `1.23ms`, `456.00us` or `1.20s`.
fn milliseconds(text: &str) -> anyhow::Result<f64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        other => bail!("{other:?} is no unit of time"),
    };
    Ok(digits.parse::<f64>()? * factor)
}

fn h2load(port: u16, host: IpAddr, lasts: Duration) -> anyhow::Result<Measured> {
    let log = tempfile::NamedTempFile::new()?;
    let output = Command::new("h2load")
        .args(["-c8", "-m16", "-t2", &format!("-D{}", lasts.as_secs())])
        .arg(format!("--log-file={}", log.path().display()))
        .arg(format!("http://{host}:{port}/"))
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = std::fs::read_to_string(log.path())?;
    let mut taken = Vec::new();
    for line in lines.lines() {
        let mut fields = line.split_whitespace().skip(1);
        if fields.next() != Some("200") {
            bail!("a request failed: {line}\n{text}");
        }
        taken.push(fields.next().context("h2load's log has another form")?.parse::<u32>()?);
    }
    taken.sort_unstable();
    let at = |part: usize| taken.get(taken.len() * part / 100).map_or(0.0, |&us| f64::from(us) / 1e3);
    let count = u32::try_from(taken.len())?;
    Ok(Measured {
        per_second: f64::from(count) / lasts.as_secs_f64(),
        half_ms: at(50),
        last_ms: at(99),
        units: f64::from(count) / 1e6,
    })
}

/// No answers here whose time could be told.
#[expect(clippy::cast_precision_loss, reason = "bytes read within seconds stay far below 2^52")]
fn read_bytes(port: u16, host: IpAddr, lasts: Duration) -> Measured {
    let begin = Instant::now();
    let readers: Vec<_> = (0..STREAMS)
        .map(|_| {
            std::thread::spawn(move || {
                let Ok(mut stream) = TcpStream::connect((host, port)) else { return 0_u64 };
                let (mut buffer, mut total) = (vec![0; 256 * 1024], 0);
                while begin.elapsed() < lasts {
                    match stream.read(&mut buffer) {
                        Ok(read) if read > 0 => total += read as u64,
                        _ => break,
                    }
                }
                total
            })
        })
        .collect();
    let total: u64 = readers.into_iter().map(|reader| reader.join().unwrap_or(0)).sum();
    let gibibytes = total as f64 / f64::from(1 << 30);
    Measured {
        per_second: gibibytes * 1024.0 / begin.elapsed().as_secs_f64(),
        half_ms: f64::NAN,
        last_ms: f64::NAN,
        units: gibibytes,
    }
}

/// A service that writes zeroes to whoever connects, on `HOST` and `PORT`.
pub(crate) fn source() -> anyhow::Result<()> {
    let port: u16 = std::env::var("PORT").context("PORT is not set")?.parse()?;
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let zeroes = vec![0; 256 * 1024];
    std::thread::scope(|scope| {
        for stream in listener.incoming().flatten() {
            let zeroes = &zeroes;
            scope.spawn(move || {
                let mut stream = stream;
                while stream.write_all(zeroes).is_ok() {}
            });
        }
    });
    Ok(())
}
