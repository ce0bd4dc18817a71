//! A snapshot file back into a hub, offline: the data directory of *one* stopped member becomes that of a hub with
//! this one member, in a new incarnation. The others are added to it under new ids. Restoring each member by itself
//! would need all of them to agree on file and incarnation, and nothing would notice that they do not.
//!
//! The new directory is built beside the old one and takes its place in one step; the old one stays under another
//! name. What is wrong with a file, a directory or a running cluster is said before anything is written.

mod inspect;
pub(crate) mod reached;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nave_orchestrator_core::ClusterState;
use nave_orchestrator_core::restore::{NotRestorable, Target, restored};
use nave_proto::ids::MemberId;
use nave_proto::pb;
use openraft::storage::RaftLogStorage as _;
use prost::Message as _;

use self::inspect::{Contents, read_snapshot};
pub use self::inspect::{SnapshotInfo, check_snapshot};
use crate::api::peers::{INFO_TIMEOUT, Peers};
use crate::clock;
use crate::config::{ConfigError, MemberConfig};
use crate::raft::types::{LeaderId, LogId, Membership, REGISTRY_GROUP, SnapshotMeta, StoredMembership, Vote};
use crate::raft::{DirectoryError, MemberNode};
use crate::run::{RunError, identity};
use crate::storage::directory::{DataDirectory, sync_directory};
use crate::storage::failure::Failure;
use crate::storage::log::LogDatabase;
use crate::storage::snapshot::{SnapshotDirectory, SnapshotWriter};
use crate::storage::state::StateDatabase;

/// Why nothing was restored; in each case nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file cannot be read at all.
    #[error("cannot read the snapshot {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is not what a hub wrote: cut short, altered, or something else.
    #[error("{path} cannot be restored: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A newer build wrote it, and may have said things that this one would lose.
    #[error(
        "{path} was written by nave {version}, whose command format is {found}; this program knows up to {known}: \
         restore it with that version"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Of the program that wrote it.
        version: String,
        /// Its command format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The rows do not make a hub.
    #[error("{path} cannot be restored: {source}")]
    NotRestorable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: NotRestorable,
    },
    /// The file is of another cluster and that was not asked for.
    #[error(
        "{path} is of cluster {found}, {member} is of cluster {expected}; with --other-cluster its services go over, its hosts do not"
    )]
    OtherCluster {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose the member is.
        expected: String,
        /// The member.
        member: MemberId,
    },
    /// Members of the cluster are running.
    #[error("{} of this cluster still runs at {address}: stop all members first, or two hubs would rule the same hosts", .member)]
    Running {
        /// Which.
        member: String,
        /// Where.
        address: String,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The CA.
    #[error(transparent)]
    Identity(Box<RunError>),
    /// The data directory is in use, or of another member.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The new directory could not be written.
    #[error("cannot write {path}; the data directory is as it was")]
    Write {
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What was done.
#[derive(Debug, Clone)]
pub struct Restored {
    /// Of the file.
    pub snapshot: SnapshotInfo,
    /// Of the restored hub.
    pub incarnation: u64,
    /// Its first revision.
    pub revision: u64,
    /// Where the data directory that was there is now.
    pub set_aside: Option<PathBuf>,
    /// The file is of another cluster: its hosts and instances were left out.
    pub other_cluster: bool,
}

/// Makes the member of this configuration a hub of one, with the snapshot's rows. The member must be stopped, and so
/// must all others: those that the configuration names are asked.
pub async fn restore(
    config: &MemberConfig,
    file: &Path,
    allow_other_cluster: bool,
) -> Result<Restored, RestoreError> {
    config.check()?;
    let path = file.to_owned();
    let contents = tokio::task::spawn_blocking(move || read_snapshot(&path)).await;
    let contents = contents.map_err(|error| read_error(file, io::Error::other(error)))??;
    let cluster_id = config.cluster_id.to_string();
    let other_cluster = contents.info.cluster_id != cluster_id;
    if other_cluster && !allow_other_cluster {
        return Err(RestoreError::OtherCluster {
            path: file.to_owned(),
            found: contents.info.cluster_id.clone(),
            expected: cluster_id,
            member: config.id,
        });
    }
    refuse_running(config).await?;
    // Held until the end: the member cannot start meanwhile.
    let old = match config.data_dir.join("identity").exists() {
        true => Some(DataDirectory::open(&config.data_dir, config.cluster_id, config.id)?),
        false => None,
    };
    let plan = plan(config, file, &contents, old.as_ref())?;
    let fresh = sibling(&config.data_dir, "restoring");
    let write = |source| RestoreError::Write { path: fresh.clone(), source };
    remove_left_over(&fresh).map_err(write)?;
    build(config, &fresh, &plan).await.map_err(write)?;
    let set_aside = swap(&config.data_dir, &fresh, plan.incarnation).map_err(write)?;
    drop(old);
    Ok(Restored {
        snapshot: contents.info,
        incarnation: plan.incarnation,
        revision: plan.revision,
        set_aside,
        other_cluster,
    })
}

fn read_error(path: &Path, source: io::Error) -> RestoreError {
    RestoreError::Read { path: path.to_owned(), source }
}

/// The other members of the configuration, by the certificate that this one would show them.
async fn refuse_running(config: &MemberConfig) -> Result<(), RestoreError> {
    let (_, credentials) = identity::load(config).map_err(|error| RestoreError::Identity(Box::new(error)))?;
    let peers = Peers::new(config.id, credentials);
    let listed: Vec<_> = config
        .members
        .iter()
        .map(|member| {
            let node = MemberNode { name: member.name.clone(), address: member.address.clone() };
            (member.id, node, true)
        })
        .collect();
    let answered = peers.infos(&listed, INFO_TIMEOUT).await;
    let running = listed.into_iter().find(|(id, _, _)| answered.contains_key(id));
    running.map_or(Ok(()), |(_, node, _)| {
        Err(RestoreError::Running { member: node.name, address: node.address })
    })
}

/// What the new directory holds.
struct Plan {
    rows: Vec<(Vec<u8>, Vec<u8>)>,
    meta: SnapshotMeta,
    vote: Vote,
    incarnation: u64,
    revision: u64,
}

fn plan(
    config: &MemberConfig,
    file: &Path,
    contents: &Contents,
    old: Option<&DataDirectory>,
) -> Result<Plan, RestoreError> {
    let last = contents.meta.last_log_id.unwrap_or(LogId::new(LeaderId { term: 1, node_id: config.id.0 }, 1));
    // The old directory may be damaged: that is a reason to restore. Then the gaps alone must do.
    let known = old.and_then(reached::reached);
    let of_known = known.as_ref().map_or(0, |(cluster, _)| cluster.incarnation);
    let seconds = u64::try_from(clock::unix_now_ns() / 1_000_000_000).unwrap_or(0);
    let incarnation = seconds.max(contents.info.incarnation + 1).max(of_known + 1);
    let highest = contents.meta.last_membership.nodes().map(|(id, _)| *id).max().unwrap_or(0);
    let configured = config.members.iter().map(|member| member.id.0).max().unwrap_or(0);
    let target = Target {
        cluster_id: config.cluster_id.to_string(),
        incarnation,
        member_id_floor: highest.max(configured).max(config.id.0) + 1,
        known,
    };
    let rows = restored(contents.rows.clone(), &target)
        .map_err(|source| RestoreError::NotRestorable { path: file.to_owned(), source })?;
    let damaged = |what: String| RestoreError::Damaged { path: file.to_owned(), what };
    let state = ClusterState::from_rows(rows, last.index).map_err(|error| damaged(error.to_string()))?;
    state.check().map_err(damaged)?;
    let records = state.records().filter_map(|change| Some((change.key(), change.value()?)));
    let mut rows: Vec<_> = records.collect();
    rows.sort();
    let own = MemberNode { name: config.name.clone(), address: config.advertise.clone() };
    let members = std::collections::BTreeMap::from([(config.id.0, own)]);
    let membership = Membership::new(vec![[config.id.0].into()], members).expect("one voter that is a node");
    Ok(Plan {
        rows,
        meta: SnapshotMeta {
            last_log_id: Some(last),
            last_membership: StoredMembership::new(Some(last), membership),
        },
        // Above every leader whose entries the snapshot holds, so that terms go on rising.
        vote: Vote::new(last.leader_id.term + 1, config.id.0),
        incarnation,
        revision: state.revision(),
    })
}

/// A whole data directory: snapshot, state, and a log that begins after them. Durable on return.
async fn build(config: &MemberConfig, path: &Path, plan: &Plan) -> io::Result<()> {
    let directory = DataDirectory::open(path, config.cluster_id, config.id)
        .map_err(|error| io::Error::other(error.to_string()))?;
    let snapshots = SnapshotDirectory::open(&directory.snapshots())?;
    let temporary = snapshots.temporary("restore");
    let mut writer = SnapshotWriter::create(temporary.path(), &plan.meta)?;
    for (key, value) in &plan.rows {
        writer.row(key, value)?;
    }
    writer.finish()?;
    let file = snapshots.publish(&temporary, &plan.meta)?;
    file.verify()?;

    let failure = Failure::new();
    let (state, _) = StateDatabase::open(&directory.state(), failure.clone())?;
    state.handle().replace(file).await?;
    let log = LogDatabase::open(&directory.log(), failure)?;
    let mut registry = log.group(REGISTRY_GROUP)?;
    if let Some(last) = plan.meta.last_log_id {
        registry.purge(last).await?;
    }
    // Synced, and the purge before it in the same log.
    registry.save_vote(&plan.vote).await?;
    // They wait for their writer threads, which is short: nothing is queued any more.
    drop((log, state));
    sync_directory(path)
}

/// Puts `fresh` in the place of `data_dir` in one step. Returns where the old directory is.
fn swap(data_dir: &Path, fresh: &Path, incarnation: u64) -> io::Result<Option<PathBuf>> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    let parent = data_dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !data_dir.exists() {
        fs::rename(fresh, data_dir)?;
        sync_directory(parent)?;
        return Ok(None);
    }
    renameat2(AT_FDCWD, fresh, AT_FDCWD, data_dir, RenameFlags::RENAME_EXCHANGE)?;
    let aside = sibling(data_dir, &format!("before-{incarnation}"));
    fs::rename(fresh, &aside)?;
    sync_directory(parent)?;
    Ok(Some(aside))
}

/// `data.restoring` beside `data`.
fn sibling(data_dir: &Path, suffix: &str) -> PathBuf {
    let mut name = data_dir.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{suffix}"));
    data_dir.with_file_name(name)
}

/// Of a restore that was interrupted: nobody has used it.
fn remove_left_over(fresh: &Path) -> io::Result<()> {
    match fs::remove_dir_all(fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn decode_row(value: &[u8]) -> Result<pb::Row, String> {
    let row = pb::Row::decode(value).map_err(|error| format!("a row cannot be read: {error}"))?;
    match row.row {
        Some(_) => Ok(row),
        None => Err("it holds a row of a kind that this build does not know".to_owned()),
    }
}
