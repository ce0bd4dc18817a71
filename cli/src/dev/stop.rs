//! Takes a dev cluster down in the order of flow: services, agents, keepers, members. Each agent ends its services as
//! their manifests say, what is needed after what needs it. Each step has a deadline; a second signal gives services no
//! more time, a third skips the rest.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures::future::join_all;
use nave_keeper::client::{Client, socket_path};
use rustix::process::Signal;
use tokio::time::timeout;

use super::process::Process;
use super::role::{Kind, Role};
use super::supervise::{Held, Supervised};
use super::{Signals, say};
use crate::failure::Failure;

/// For the agent to end its services as their manifests say: as long as one service stays for others.
const ORDERLY: Duration = Duration::from_secs(300);
/// How often a person who waits is told for whom.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// Between SIGTERM and SIGKILL for what the agent has not ended.
const SERVICE_GRACE: Duration = Duration::from_secs(10);
/// For the keeper to reap, write its records and end.
const KEEPER_GRACE: Duration = Duration::from_secs(5);
const AGENT_GRACE: Duration = Duration::from_secs(5);
/// A member writes nothing back that its log does not have.
const MEMBER_GRACE: Duration = Duration::from_secs(5);

pub(super) async fn all(supervised: Supervised, signals: &mut Signals) -> Result<(), Failure> {
    let held = supervised.hand_over().await;
    if held.is_empty() {
        return Ok(());
    }
    let (mut agents, mut members): (Vec<Held>, Vec<Held>) =
        held.into_iter().partition(|(role, _)| role.kind == Kind::Agent);
    if !in_order(&mut agents, &mut members, Pace::Orderly, signals).await {
        say("asked again: stopping everything at once");
        if !in_order(&mut agents, &mut members, Pace::AtOnce, signals).await {
            force(agents.iter().chain(&members));
            let failure =
                Failure::refused("forced: every member, keeper and agent was killed, services may still run");
            return Err(failure.next("`nave dev` with the same --data-dir adopts them"));
        }
    }
    say("stopped");
    Ok(())
}

/// How much time services get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// What their manifests say, what is needed after what needs it.
    Orderly,
    AtOnce,
}

/// Hosts, then members. False: another signal has come before the end.
async fn in_order(agents: &mut [Held], members: &mut [Held], pace: Pace, signals: &mut Signals) -> bool {
    let orderly = async {
        join_all(agents.iter_mut().map(|held| stop_host(held, pace))).await;
        join_all(members.iter_mut().map(|(_, process)| end(process.as_mut(), MEMBER_GRACE))).await;
    };
    tokio::select! {
        () = orderly => true,
        _ = signals.next() => false,
    }
}

/// Services first, through their keeper and its agent; then the agent, then the keeper.
async fn stop_host((role, keeper): &mut Held, pace: Pace) {
    let socket = socket_path(&role.folder);
    let name = role.name.clone();
    let limit = match pace {
        Pace::Orderly => ORDERLY + SERVICE_GRACE + KEEPER_GRACE,
        Pace::AtOnce => KEEPER_GRACE,
    };
    let asked = tokio::task::spawn_blocking(move || {
        let mut client = Client::connect(&socket)?;
        client.set_timeout(Some(limit))?;
        if pace == Pace::AtOnce {
            return client.shutdown(true, Duration::ZERO);
        }
        if let Ok(running) = client.list()
            && !running.is_empty()
        {
            say(format_args!("{name}: stopping {}", services(running.len())));
        }
        client.shutdown_in_order(ORDERLY, SERVICE_GRACE)
    });
    let mut ended = pin!(timeout(limit, asked));
    let ended = loop {
        match timeout(SAY_EVERY, ended.as_mut()).await {
            Ok(ended) => break ended,
            Err(_) => say_what_runs(role).await,
        }
    };
    match ended {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) if keeper.is_some() => {
            say(format_args!(
                "{}: its keeper did not stop the services ({error}); they may still run",
                role.name
            ));
        }
        Ok(_) => {}
        Err(_) => say(format_args!("{}: its services did not end in time; they may still run", role.name)),
    }
    end(keeper.as_mut(), KEEPER_GRACE).await;
    end(role.agent_process().as_mut(), AGENT_GRACE).await;
}

/// A person who waits is told for whom.
async fn say_what_runs(role: &Role) {
    let socket = socket_path(&role.folder);
    let names = tokio::task::spawn_blocking(move || {
        let mut client = Client::connect(&socket).ok()?;
        client.set_timeout(Some(Duration::from_secs(1))).ok()?;
        let names: BTreeSet<String> = client.list().ok()?.into_iter().map(|kept| kept.service).collect();
        Some(names.into_iter().collect::<Vec<_>>().join(", "))
    });
    match names.await.ok().flatten() {
        Some(names) if !names.is_empty() => {
            say(format_args!("{}: {names} still run; again, and they are killed", role.name));
        }
        Some(_) | None => {}
    }
}

fn services(number: usize) -> String {
    if number == 1 { "1 process".to_owned() } else { format!("{number} processes") }
}

/// SIGTERM, and SIGKILL after the grace.
async fn end(process: Option<&mut Process>, grace: Duration) {
    let Some(process) = process else { return };
    process.signal(Signal::TERM);
    if within(grace, process.ended()).await {
        return;
    }
    process.signal(Signal::KILL);
    within(Duration::from_secs(1), process.ended()).await;
}

async fn within<T>(limit: Duration, ended: impl Future<Output = T>) -> bool {
    timeout(limit, ended).await.is_ok()
}

fn force<'a>(held: impl Iterator<Item = &'a Held>) {
    for (role, process) in held {
        for process in process.iter().chain(&role.agent_process().filter(|_| role.kind == Kind::Agent)) {
            process.signal(Signal::KILL);
        }
    }
}
