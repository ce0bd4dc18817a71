//! openraft's settings, with the reason of each that is not its default.

use std::sync::Arc;
use std::time::Duration;

use openraft::{Config, ConfigError, SnapshotPolicy};

/// Milliseconds. Measured with 100/250/350 over an fsync of 0.3 ms: 555 / 615 / 659 ms (least, median, most) from
/// SIGKILL of the leader to the next acknowledged write, against 736 / 826 / 957 with 300 to 500. An election time-out
/// should be ten times the slowest usual append: fsyncs below 25 ms at the 99th percentile, which any SSD keeps.
const HEARTBEAT_MS: u64 = 100;
const ELECTION_MIN_MS: u64 = 250;
const ELECTION_MAX_MS: u64 = 350;

/// How long a leader may go on without hearing from a quorum before it is no longer believed; openraft's lease.
pub(crate) const LEASE: Duration = Duration::from_millis(ELECTION_MAX_MS);

/// Entries between snapshots, and how many of those in the snapshot stay in the log, so that a follower that was away
/// for less is served from the log.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotSettings {
    pub entries_between: u64,
    pub entries_kept: u64,
    /// A snapshot by this policy is put off while the last one is younger, unless ten times as many entries wait: a
    /// burst of writes must not write the whole state every second.
    pub interval_min: Duration,
}

impl Default for SnapshotSettings {
    /// 50,000 entries of 500 bytes are 25 MB of log, of which 10,000 are kept; in a burst up to 250 MB.
    fn default() -> Self {
        Self { entries_between: 50_000, entries_kept: 10_000, interval_min: Duration::from_secs(30) }
    }
}

pub(crate) fn config(cluster_name: String, snapshots: SnapshotSettings) -> Result<Arc<Config>, ConfigError> {
    let config = Config {
        cluster_name,
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MIN_MS,
        election_timeout_max: ELECTION_MAX_MS,
        // NOT OPTIONAL. The default lets a leader that is killed and back at once lead on in its old term, although
        // its unsynced entries were acknowledged by the others: it hands out their indexes again and the log forks.
        enable_leader_restore: Some(false),
        // A member cut off for a while must not come back with a higher term and unseat the leader.
        enable_pre_vote: Some(true),
        // An old leader without a quorum must stop to beat, else it keeps a connected majority from electing
        // (openraft#2080). The least that is allowed: lease plus the longest election time-out.
        quorum_loss_probe_interval: Some(2 * ELECTION_MAX_MS),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshots.entries_between),
        max_in_snapshot_log_to_keep: snapshots.entries_kept,
        purge_batch_size: snapshots.entries_between.min(256),
        // The whole transfer and installation; a dead peer is noticed by the connection's keep-alive long before.
        install_snapshot_timeout: 10 * 60 * 1000,
        api_batch_linger_ms: 0,
        heartbeat_min_interval: None,
        broadcast_submitted_on_append: None,
        ..Config::default()
    };
    Ok(Arc::new(config.validate()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_valid_and_keep_leader_restore_off() {
        let config = config("test".to_owned(), SnapshotSettings::default()).unwrap();
        assert_eq!(config.enable_leader_restore, Some(false));
        assert_eq!(config.enable_pre_vote, Some(true));
    }
}
