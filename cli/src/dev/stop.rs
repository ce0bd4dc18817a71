//! Takes a dev cluster down in the order of flow: services, keepers, agents, members. Each step has a deadline, and a
//! second signal skips the rest.

use std::future::Future;
use std::time::Duration;

use futures::future::join_all;
use nave_keeper::client::{Client, socket_path};
use rustix::process::Signal;
use tokio::time::timeout;

use super::process::Process;
use super::role::Kind;
use super::supervise::{Held, Supervised};
use super::{Signals, say};
use crate::failure::Failure;

/// Between SIGTERM and SIGKILL for a service.
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
    let orderly = async {
        join_all(agents.iter_mut().map(stop_host)).await;
        join_all(members.iter_mut().map(|(_, process)| end(process.as_mut(), MEMBER_GRACE))).await;
    };
    let finished = tokio::select! {
        () = orderly => true,
        _ = signals.next() => false,
    };
    if finished {
        say("stopped");
        return Ok(());
    }
    force(agents.iter().chain(&members));
    Err(Failure::refused("forced: every member, keeper and agent was killed, services may still run")
        .next("`nave dev` with the same --data-dir adopts them"))
}

/// Services first, through their keeper; then the keeper, then its agent.
async fn stop_host((role, keeper): &mut Held) {
    let socket = socket_path(&role.folder);
    let name = role.name.clone();
    let asked = tokio::task::spawn_blocking(move || {
        let mut client = Client::connect(&socket)?;
        client.set_timeout(Some(SERVICE_GRACE + KEEPER_GRACE))?;
        if let Ok(running) = client.list()
            && !running.is_empty()
        {
            say(format_args!("{name}: stopping {}", services(running.len())));
        }
        client.shutdown(true, SERVICE_GRACE)
    });
    match timeout(SERVICE_GRACE + KEEPER_GRACE, asked).await {
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
