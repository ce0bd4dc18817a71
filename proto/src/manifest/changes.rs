//! What differs between two manifests, for people and for the scheduler.

use std::collections::BTreeMap;

use super::document::Document;
use super::tree::Path;
use crate::pb;

/// Whether both give a running process the same limits.
pub fn same_limits(a: &pb::Manifest, b: &pb::Manifest) -> bool {
    a.resources.unwrap_or_default() == b.resources.unwrap_or_default()
}

/// Whether both start their processes with the same things, so that going from one to the other replaces none. Limits
/// of its cgroup can be changed while a process runs; those that it gave itself as it began cannot.
pub fn same_template(a: &pb::Manifest, b: &pb::Manifest) -> bool {
    let begun = |manifest: &pb::Manifest| {
        let resources = manifest.resources.unwrap_or_default();
        (resources.nice, resources.oom_score_adj)
    };
    let stops = |manifest: &pb::Manifest| {
        manifest.placement.as_ref().is_some_and(|place| place.on_disconnect() == pb::OnDisconnect::Stop)
    };
    let is_job = |manifest: &pb::Manifest| manifest.kind() == pb::Kind::Job;
    // How calls are carried is the agents' affair: no process hears of it.
    let bound = |manifest: &pb::Manifest| {
        let mut ports = manifest.ports.clone();
        ports.values_mut().for_each(|port| port.calls = None);
        ports
    };
    // The other two hooks find a process as it was started.
    let starts = |manifest: &pb::Manifest| {
        manifest.hooks.clone().map(|hooks| (hooks.pre_start, hooks.post_start)).unwrap_or_default()
    };
    a.command == b.command
        && is_job(a) == is_job(b)
        && a.env == b.env
        && a.user == b.user
        && a.working_dir == b.working_dir
        && a.files == b.files
        && a.artifacts == b.artifacts
        && a.env_files == b.env_files
        && a.secrets == b.secrets
        && a.data == b.data
        && bound(a) == bound(b)
        && begun(a) == begun(b)
        && a.rlimits == b.rlimits
        && a.isolation.clone().unwrap_or_default() == b.isolation.clone().unwrap_or_default()
        && starts(a) == starts(b)
        // One that must never run twice is started under a lease.
        && stops(a) == stops(b)
}

/// Every key whose value differs, in the order of the definition, with both values as a person would write them in
/// TOML; empty where the key is not set.
pub fn diff(before: Option<&pb::Manifest>, after: &pb::Manifest) -> Vec<pb::FieldChange> {
    let before = before.map(leaves).unwrap_or_default();
    let after = leaves(after);
    let text = |of: &BTreeMap<Key, String>, key: &Key| of.get(key).cloned().unwrap_or_default();
    let mut keys: Vec<&Key> = before.keys().chain(after.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .map(|key| pb::FieldChange {
            path: key.1.clone(),
            before: text(&before, key),
            after: text(&after, key),
        })
        .filter(|change| change.before != change.after)
        .collect()
}

/// The place of the first part in the definition, then the path.
type Key = (usize, String);

fn leaves(manifest: &pb::Manifest) -> BTreeMap<Key, String> {
    let mut leaves = BTreeMap::new();
    let value = toml::Value::try_from(Document::from(manifest)).expect("a document is a TOML table");
    collect(&value, &Path::default(), usize::MAX, &mut leaves);
    leaves
}

fn collect(value: &toml::Value, path: &Path, rank: usize, leaves: &mut BTreeMap<Key, String>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let at_root = path.0.is_empty();
                let place = || super::definition::ROOT.iter().position(|known| known == key);
                let rank = if at_root { place().unwrap_or(usize::MAX) } else { rank };
                collect(value, &path.key(key), rank, leaves);
            }
        }
        leaf => {
            leaves.insert((rank, path.to_string()), leaf.to_string());
        }
    }
}
