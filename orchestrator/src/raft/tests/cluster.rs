//! A cluster of members in this process: real databases, real TLS, real sockets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nave_orchestrator_core::{Change, ClusterState};
use nave_proto::ids::{ClusterId, MemberId};
use nave_proto::pb;
use nave_tls::{Authority, ClientPolicy, Credentials, IncomingLimits, MEMBER_VALIDITY};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::raft::{ApplyObserver, MemberNode, RaftHub, RaftOptions, Role, SnapshotSettings};

pub(super) const CLUSTER: ClusterId = ClusterId(0xc1);
/// Generous: two busy cores.
pub(super) const SOON: Duration = Duration::from_secs(30);

/// Counts what it is told and checks that revisions never go back.
#[derive(Debug, Default)]
pub(super) struct Counting {
    pub(super) revision: AtomicU64,
    pub(super) applied: AtomicU64,
    pub(super) restored: AtomicU64,
}

impl ApplyObserver for Counting {
    fn applied(&self, revision: u64, _: &[Change]) {
        let before = self.revision.swap(revision, Ordering::SeqCst);
        assert!(revision >= before, "revision {revision} after {before}");
        self.applied.fetch_add(1, Ordering::SeqCst);
    }

    fn settled(&self, revision: u64) {
        assert_eq!(revision, self.revision.load(Ordering::SeqCst));
    }

    fn restored(&self, state: &ClusterState) {
        self.revision.store(state.revision(), Ordering::SeqCst);
        self.restored.fetch_add(1, Ordering::SeqCst);
    }
}

pub(super) struct Member {
    pub(super) hub: RaftHub,
    pub(super) observer: Arc<Counting>,
    server: CancellationToken,
    tasks: JoinSet<()>,
}

pub(super) struct Cluster {
    dir: tempfile::TempDir,
    authority: Authority,
    pub(super) nodes: BTreeMap<MemberId, MemberNode>,
    listeners: BTreeMap<MemberId, SocketAddr>,
    pub(super) members: BTreeMap<MemberId, Member>,
    snapshots: SnapshotSettings,
}

impl Cluster {
    pub(super) async fn start(count: u64, snapshots: SnapshotSettings) -> Self {
        let mut cluster = Self {
            dir: tempfile::tempdir().unwrap(),
            authority: Authority::generate(CLUSTER),
            nodes: BTreeMap::new(),
            listeners: BTreeMap::new(),
            members: BTreeMap::new(),
            snapshots,
        };
        let mut listeners = BTreeMap::new();
        for number in 1..=count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let node = MemberNode { name: format!("member-{number}"), address: address.to_string() };
            cluster.nodes.insert(MemberId(number), node);
            cluster.listeners.insert(MemberId(number), address);
            listeners.insert(MemberId(number), listener);
        }
        for (id, listener) in listeners {
            cluster.run_on(id, listener).await;
        }
        cluster.any().hub.initialize(cluster.nodes.clone()).await.unwrap();
        cluster.any().hub.propose(init(), soon()).await.unwrap();
        cluster
    }

    pub(super) fn data_dir(&self, id: MemberId) -> PathBuf {
        self.dir.path().join(id.to_string())
    }

    pub(super) fn credentials(&self, id: MemberId) -> Credentials {
        self.credentials_of(nave_tls::Role::Member(id))
    }

    pub(super) fn credentials_of(&self, role: nave_tls::Role) -> Credentials {
        let now = clock::unix_now_ns() / 1_000_000_000;
        self.authority.issue_new(role, MEMBER_VALIDITY, now).unwrap()
    }

    pub(super) fn options(&self, id: MemberId) -> RaftOptions {
        let mut options = RaftOptions::new(CLUSTER, id, self.data_dir(id), self.credentials(id));
        options.snapshots = self.snapshots;
        options.free_bytes_min = 0;
        options
    }

    async fn run_on(&mut self, id: MemberId, listener: TcpListener) {
        let observer = Arc::new(Counting::default());
        let deadline = Instant::now() + SOON;
        let hub = loop {
            match RaftHub::start(self.options(id), observer.clone()).await {
                Ok(hub) => break hub,
                // A task of the member that was killed may still hold its databases for a moment.
                Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
            }
            tokio::task::yield_now().await;
        };
        let (transport, member) = hub.services();
        let config =
            nave_tls::server_config(&self.credentials(id), ClientPolicy { anonymous: false, expired: false });
        let server = CancellationToken::new();
        let incoming = nave_tls::incoming(listener, config, IncomingLimits::default(), server.clone());
        let mut tasks = JoinSet::new();
        let stop = server.clone();
        tasks.spawn(async move {
            tonic::transport::Server::builder()
                .add_service(transport)
                .add_service(member)
                .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
                .await
                .unwrap();
        });
        self.members.insert(id, Member { hub, observer, server, tasks });
    }

    /// Starts a member again on its data and address.
    pub(super) async fn restart(&mut self, id: MemberId) {
        let address = self.listeners[&id];
        let deadline = Instant::now() + SOON;
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(error) => {
                    assert!(Instant::now() < deadline, "{error}");
                    tokio::task::yield_now().await;
                }
            }
        };
        self.run_on(id, listener).await;
    }

    /// Cuts a member off without a handover: its connections are gone at once, then its parts.
    pub(super) async fn kill(&mut self, id: MemberId) {
        let mut member = self.members.remove(&id).unwrap();
        member.server.cancel();
        member.tasks.shutdown().await;
        member.hub.kill().await;
    }

    pub(super) async fn stop(&mut self, id: MemberId) {
        let mut member = self.members.remove(&id).unwrap();
        member.hub.shutdown().await;
        member.server.cancel();
        member.tasks.shutdown().await;
    }

    pub(super) fn any(&self) -> &Member {
        self.members.values().next().unwrap()
    }

    pub(super) fn hub(&self, id: MemberId) -> &RaftHub {
        &self.members[&id].hub
    }

    /// The one that all running members follow.
    pub(super) async fn leader(&self) -> MemberId {
        let found = timeout(SOON, async {
            loop {
                let seen: Vec<_> =
                    self.members.values().map(|m| *m.hub.subscribe_status().borrow()).collect();
                let leader = seen[0].leader;
                if let Some(leader) = leader
                    && seen.iter().all(|status| status.leader == Some(leader) && status.term == seen[0].term)
                    && self.members.get(&leader).is_some_and(|m| m.hub.status().role == Role::Leader)
                {
                    return leader;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        found.await.expect("a leader")
    }

    pub(super) fn other_than(&self, id: MemberId) -> MemberId {
        *self.members.keys().find(|other| **other != id).unwrap()
    }

    /// Waits until every running member has applied as much as the furthest; compares their tables.
    pub(super) async fn converge(&self) {
        let target = self.members.values().map(|m| m.hub.status().last_log_index).max().unwrap();
        for (id, member) in &self.members {
            let mut applied = member.hub.applied();
            let reached = timeout(SOON, applied.wait_for(|index| *index >= target)).await;
            assert!(reached.is_ok(), "{id} did not reach {target}: {:?}", member.hub.status());
        }
        let rows = |hub: &RaftHub| {
            let state = hub.state();
            (state.applied_index(), state.rows().collect::<Vec<_>>())
        };
        let expected = rows(&self.any().hub);
        for (id, member) in &self.members {
            assert_eq!(rows(&member.hub), expected, "{id}");
            member.hub.state().check().unwrap();
        }
    }
}

/// A command that adds one row: a token of this id.
pub(super) fn token(id: &str) -> pb::Command {
    pb::Command {
        actor: "operator/test".to_owned(),
        body: Some(pb::command::Body::CreateToken(pb::CreateToken {
            token: Some(pb::TokenRecord {
                id: id.to_owned(),
                secret_sha256: vec![7; 32],
                expires_unix_ns: i64::MAX,
                uses_left: 3,
                ..Default::default()
            }),
        })),
        ..Default::default()
    }
}

pub(super) fn init() -> pb::Command {
    pb::Command {
        actor: "hub".to_owned(),
        body: Some(pb::command::Body::InitCluster(pb::InitCluster {
            cluster_id: CLUSTER.to_string(),
            incarnation: 1,
            first_token: None,
        })),
        ..Default::default()
    }
}

pub(super) fn soon() -> Instant {
    Instant::now() + SOON
}
