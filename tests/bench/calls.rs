//! Calls while things happen, what an endpoint's slowness or death costs them, and what it costs to know many services:
//! `nave-bench calls`, or one of `through`, `slow`, `deaths` and `known` after it. A service is called at its own
//! address at fixed times, whatever the answers do, and a call's time counts from when it was due.

mod answer;
mod deaths;
mod generator;
mod known;
mod slow;
mod through;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nave_tests::Cluster;

pub(crate) use answer::answer;

/// Run as a service, by the measurement itself.
pub(crate) const ANSWER: &str = "__answer";

pub(crate) fn run() -> anyhow::Result<()> {
    crate::rooms(&[
        ("through", through::run),
        ("slow", slow::run),
        ("deaths", deaths::run),
        ("known", known::run),
    ])
}

/// So many rounds instead, to try something: `nave-bench calls ROOM ROUNDS`.
fn rounds(usual: usize) -> usize {
    std::env::args().nth(3).and_then(|rounds| rounds.parse().ok()).unwrap_or(usual)
}

/// Where a service is called on the first host, and which agent that is.
fn address(cluster: &Cluster, service: &str) -> anyhow::Result<(SocketAddr, usize)> {
    let address = cluster.address(service);
    // As the harness gives them out.
    let of = |port: u16| u8::try_from(88 + port % 160).ok();
    let second = match address.ip() {
        std::net::IpAddr::V4(ip) => ip.octets()[1],
        std::net::IpAddr::V6(_) => bail!("{address} is no address of a service"),
    };
    let agent = cluster.agents.iter().position(|agent| of(agent.port) == Some(second));
    Ok((address, agent.with_context(|| format!("no agent has {address}"))?))
}

/// The half, the last twentieth, the last hundredth and the last of them, in milliseconds.
fn spread(mut all: Vec<Duration>) -> [f64; 4] {
    all.sort_unstable();
    let rank = |part: usize| (all.len() * part).div_ceil(100).saturating_sub(1);
    [50, 95, 99, 100].map(|part| all.get(rank(part)).map_or(0.0, |took| took.as_secs_f64() * 1000.0))
}
