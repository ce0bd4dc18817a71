//! `nave cluster add|replace|remove`: the hub is told what shall be, and brings it about by itself; the wait only
//! looks. A new member's folder is written here, from a CA that the person has: the CA's key never leaves the hub.

use std::time::Duration;

use nave_proto::pb;
use tokio::time::Instant;

use crate::args::{AddMember, RemoveMember};
use crate::client::Hub;
use crate::context::ClientFile;
use crate::failure::{Exit, Failure};
use crate::member_folder::{self, NewFolder};
use crate::out::{self, Tone};
use crate::progress::Progress;
use crate::{init, when};

const LOOK_EVERY: Duration = Duration::from_millis(250);

pub(super) async fn add(args: &AddMember, replaces: Option<&str>, hub: &Hub) -> Result<(), Failure> {
    let address = init::address("ADDR", &args.address)?;
    let known = status(hub).await?.members.iter().any(|member| {
        member.address == address && replaces.is_none_or(|old| old != member.id && old != member.name)
    });
    // Before anything is reserved: without the CA there is no folder, and without a folder no member.
    let ca = match member_folder::find_ca(args.ca.as_deref(), &hub.context().path) {
        Ok(ca) => Some(ca),
        Err(_) if known && args.out.is_none() => None,
        Err(failure) => return Err(failure),
    };
    let request = pb::AddMemberRequest {
        name: args.name.clone().unwrap_or_default(),
        address,
        replaces: replaces.unwrap_or_default().to_owned(),
    };
    let added = hub
        .write(|mut member| {
            let request = request.clone();
            async move { member.cluster.add_member(request).await }
        })
        .await?;
    let what = if added.already { "is known already" } else { "may join" };
    out::line(format_args!("{} ({}) {what} at {}", added.id, added.name, added.address));
    if let Some(ca) = ca {
        let folder = match &args.out {
            Some(out) => out.clone(),
            None => hub.context().path.with_file_name(&added.name),
        };
        let file = member_folder::write(&NewFolder { folder, ca, member: &added })?;
        out::line(format_args!(
            "\non its machine, with the folder copied there (it holds the CA's key: keep it private):\n  nave orchestrator --config {}\n",
            file.display()
        ));
    }
    if !args.waiting.wait {
        out::hint(format_args!("nave cluster add {} --wait", added.address));
        return Ok(());
    }
    joined(hub, &added, args.waiting.timeout).await?;
    follow_addresses(hub).await
}

/// Waits until the member votes and the change is behind it.
async fn joined(hub: &Hub, added: &pb::AddMemberResponse, timeout: Duration) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut progress = Progress::new([added.name.clone()]);
    let mut why = String::new();
    loop {
        if let Ok(status) = status(hub).await {
            let now = status.members.iter().find(|member| member.id == added.id);
            let role = now.map_or("joining", |member| member.role.as_str());
            why = now.map(|member| member.note.clone()).unwrap_or_default();
            if matches!(role, "leader" | "follower") && why.is_empty() && fresh(&status) {
                let took = format!(
                    "votes after {}",
                    when::exact(Duration::from_millis(
                        u64::try_from(begun.elapsed().as_millis()).unwrap_or(0)
                    ))
                );
                progress.set(0, Tone::Good, &took, "");
                return Ok(());
            }
            progress.set(0, Tone::Plain, role, &why);
        }
        if begun.elapsed() >= timeout {
            let because = if why.is_empty() { String::new() } else { format!(": {why}") };
            let what = format!("{} has not joined within {}{because}", added.id, when::exact(timeout));
            return Err(Failure::new(Exit::Refused, what).next(format!(
                "it goes on; `nave cluster status` shows it, `nave cluster remove {}` gives it up",
                added.id
            )));
        }
        hub.pass_over();
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

pub(super) async fn remove(args: &RemoveMember, hub: &Hub) -> Result<(), Failure> {
    let request = pb::RemoveMemberRequest { member: args.member.clone() };
    let removed = hub
        .write(|mut member| {
            let request = request.clone();
            async move { member.cluster.remove_member(request).await }
        })
        .await?;
    let begun = Instant::now();
    let mut why = String::new();
    loop {
        if let Ok(status) = status(hub).await
            && fresh(&status)
            && status.answered_by != removed.name
        {
            let Some(now) = status.members.iter().find(|member| member.id == removed.id) else { break };
            why.clone_from(&now.note);
        }
        if begun.elapsed() >= args.timeout {
            let what = format!("{} has not left within {}: {why}", removed.id, when::exact(args.timeout));
            return Err(Failure::new(Exit::Refused, what).next("it goes on; `nave cluster status` shows it"));
        }
        hub.pass_over();
        tokio::time::sleep(LOOK_EVERY).await;
    }
    out::line(format_args!("{} has left; its id is not used again", removed.id));
    out::hint("it stops by itself; its folder holds the CA's key: delete it");
    follow_addresses(hub).await
}

async fn status(hub: &Hub) -> Result<pb::ClusterStatus, Failure> {
    hub.read(
        |mut member| async move { member.cluster.get_cluster_status(pb::GetClusterStatusRequest {}).await },
    )
    .await
}

/// Of a member that hears a leader.
fn fresh(status: &pb::ClusterStatus) -> bool {
    status.freshness.as_ref().is_some_and(|freshness| freshness.has_leader)
}

/// The client file names the members that there are.
async fn follow_addresses(hub: &Hub) -> Result<(), Failure> {
    let status = status(hub).await?;
    let voters = status.members.iter().filter(|member| member.role != "joining" && member.role != "learner");
    let addresses: Vec<String> = voters.map(|member| member.address.clone()).collect();
    let path = &hub.context().path;
    if !fresh(&status) || addresses.is_empty() {
        return Ok(());
    }
    match ClientFile::set_addresses(path, &addresses) {
        Ok(false) => {}
        Ok(true) => out::line(format_args!("{} names {} now", path.display(), addresses.join(", "))),
        Err(failure) => {
            out::note(format_args!("{failure}; its addresses should be {}", addresses.join(", ")))
        }
    }
    Ok(())
}
