//! Who may connect to an instance's own port on loopback: its service's user, and root, as whom the agent is (and an
//! operator who looks for a fault; root could take the rule away). Everybody else goes through the service's address,
//! where the caller is known and held against `allow`.
//!
//! A table of nftables of our own, named for cluster and host, replaced as a whole in one transaction whenever the ports
//! change; no other table is touched, and it goes with the last port. By the socket's user and not by cgroup, since nft
//! needs the cgroup's path at the moment of loading and knows none on hosts with the hybrid layout. What a process binds
//! beside 127.0.0.1 is not guarded. Where the rule cannot be had everything goes on without it, and `nave hosts` says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Stdio;
use std::time::Duration;

use nave_proto::ids::{ClusterId, HostId};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::executor::users;
use crate::notes::Notes;

/// Changes that come together are one transaction.
const SETTLE: Duration = Duration::from_millis(20);
/// A transaction of a thousand ports takes some milliseconds.
const NFT_TIMEOUT: Duration = Duration::from_secs(10);
/// After a failure. What is missing (the program, a module of the kernel) may come to be.
const RETRY: Duration = Duration::from_secs(60);

/// Whom a port belongs to, as the manifest and the hub say it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    /// Of the manifest; empty: none.
    pub(crate) user: String,
    /// Of the service; 0: none allotted.
    pub(crate) uid: u32,
}

/// The instances' ports on this host.
pub(crate) type Guarded = BTreeMap<u16, BTreeSet<Owner>>;
/// `None`: not known yet, and what is in force stays.
pub(crate) type Told = Option<Guarded>;

/// Keeps the table as it should be.
#[derive(Debug)]
pub(crate) struct FirewallTask {
    table: String,
    wanted: watch::Receiver<Told>,
    notes: Notes,
}

impl FirewallTask {
    pub(crate) fn new(cluster: ClusterId, host: HostId, wanted: watch::Receiver<Told>, notes: Notes) -> Self {
        Self { table: format!("nave_{cluster}_{}", host.0), wanted, notes }
    }

    /// Until `shutdown`. The table stays, since the services do.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut in_force: Option<String> = None;
        let known = self.wanted.wait_for(Option::is_some);
        if !matches!(shutdown.run_until_cancelled(known).await, Some(Ok(_))) {
            return;
        }
        loop {
            let wanted = self.wanted.borrow_and_update().clone().unwrap_or_default();
            let resolved = tokio::task::spawn_blocking(move || resolve(&wanted)).await;
            let rules = rules(&self.table, &resolved.unwrap_or_default());
            if in_force.as_ref() != Some(&rules) {
                match nft(&rules).await {
                    Ok(()) => {
                        if in_force.is_none() {
                            info!(table = self.table, "instances' ports are guarded");
                        }
                        self.notes.unsay("firewall");
                        in_force = Some(rules);
                    }
                    Err(why) => {
                        let sentence =
                            format!("instances' own ports are open to every process of this host: {why}");
                        if in_force.take().is_some() {
                            warn!("{sentence}");
                        }
                        self.notes.say("firewall", sentence);
                    }
                }
            }
            let again = if in_force.is_some() { Duration::MAX } else { RETRY };
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = self.wanted.changed() => if changed.is_err() {
                    return;
                },
                () = tokio::time::sleep(again.min(Duration::from_secs(3600))) => {}
            }
            tokio::time::sleep(SETTLE).await;
        }
    }
}

/// Who may connect to each port. Asks the system's user database. A port of root's own is nobody's: a process that began
/// as root may have become anybody.
fn resolve(guarded: &Guarded) -> BTreeMap<u16, BTreeSet<u32>> {
    let mut resolved = BTreeMap::new();
    for (port, owners) in guarded {
        let uid = |owner: &Owner| users::resolve(&owner.user, owner.uid).ok()?.ids.map(|(uid, _)| uid);
        let uids: Option<BTreeSet<u32>> = owners.iter().map(uid).collect();
        if let Some(uids) = uids.filter(|uids| !uids.contains(&0)) {
            resolved.insert(*port, uids);
        }
    }
    resolved
}

/// The whole table anew, or no table where no port is to be guarded.
fn rules(table: &str, ports: &BTreeMap<u16, BTreeSet<u32>>) -> String {
    // What is not there cannot be deleted, so it is added first.
    let mut text = format!("add table inet {table}\ndelete table inet {table}\n");
    if ports.is_empty() {
        return text;
    }
    let join = |parts: Vec<String>| parts.join(", ");
    let guarded = join(ports.keys().map(u16::to_string).collect());
    let allowed = join(
        ports.iter().flat_map(|(port, uids)| uids.iter().map(move |uid| format!("{port} . {uid}"))).collect(),
    );
    // Only the first packet of a connection is looked at.
    let _infallible = write!(
        text,
        "table inet {table} {{\n\
         \tset guarded {{ type inet_service; elements = {{ {guarded} }}; }}\n\
         \tset allowed {{ type inet_service . uid; elements = {{ {allowed} }}; }}\n\
         \tchain guard {{\n\
         \t\tmeta skuid 0 accept\n\
         \t\ttcp dport . meta skuid @allowed accept\n\
         \t\treject with tcp reset\n\
         \t}}\n\
         \tchain out {{\n\
         \t\ttype filter hook output priority 0; policy accept;\n\
         \t\tip daddr 127.0.0.1 tcp flags & (syn | ack) == syn tcp dport @guarded jump guard\n\
         \t}}\n\
         }}\n"
    );
    text
}

/// One transaction. The error is for people, and the same for the same reason.
async fn nft(rules: &str) -> Result<(), String> {
    let run = async {
        let mut child = tokio::process::Command::new("nft")
            .args(["-f", "-"])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => "nft is not installed (package nftables)".to_owned(),
                _ => format!("nft cannot be started: {error}"),
            })?;
        let mut input = child.stdin.take().expect("stdin is piped above");
        // One that ends without reading says why.
        let _unread = input.write_all(rules.as_bytes()).await;
        drop(input);
        let output = child.wait_with_output().await.map_err(|error| format!("nft: {error}"))?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let said = String::from_utf8_lossy(&output.stderr);
                let first = said.lines().next().unwrap_or_default().trim();
                Err(format!("nft refuses the rule: {first}"))
            }
        }
    };
    let timed_out = |_| Err(format!("nft has not ended within {} s", NFT_TIMEOUT.as_secs()));
    tokio::time::timeout(NFT_TIMEOUT, run).await.unwrap_or_else(timed_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_port_with_its_users_and_goes_with_the_last() {
        let ports = [(20_000, [1001].into()), (20_001, [1001, 1002].into())].into();
        let text = rules("nave_1_2", &ports);
        for part in [
            "add table inet nave_1_2\ndelete table inet nave_1_2\n",
            "elements = { 20000, 20001 }",
            "elements = { 20000 . 1001, 20001 . 1001, 20001 . 1002 }",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert_eq!(
            rules("nave_1_2", &BTreeMap::new()),
            "add table inet nave_1_2\ndelete table inet nave_1_2\n"
        );
    }

    #[test]
    fn a_port_of_roots_own_or_of_somebody_unknown_is_not_guarded() {
        if !users::own_uid().is_root() {
            return;
        }
        let owner = |user: &str, uid| BTreeSet::from([Owner { user: user.to_owned(), uid }]);
        let guarded = Guarded::from([
            (1, owner("", 30_001)),
            (2, owner("root", 30_001)),
            (3, owner("nobody-has-this-name", 30_001)),
            (4, owner("", 0)),
        ]);
        assert_eq!(resolve(&guarded), [(1, BTreeSet::from([30_001]))].into());
    }
}
