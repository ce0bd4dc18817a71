//! What must hold of every state, whatever was applied. Tests call it after each command; a member may after a
//! restore. It derives every index anew from the rows and compares, so no index can drift unseen.

use std::collections::BTreeSet;

use nave_proto::pb;

use super::{ClusterState, ServiceEntry};
use crate::limits::VERSIONS_KEPT;
use crate::wants::InstanceExt as _;

impl ClusterState {
    /// The first thing that is wrong, in a sentence for a developer.
    pub fn check(&self) -> Result<(), String> {
        self.check_indexes()?;
        self.services.iter().try_for_each(|entry| self.check_service(entry))?;
        self.check_hosts()?;
        self.check_ids()?;
        self.services.check()?;
        self.events.check()?;
        self.dedup.check()?;
        crate::needs::check_acyclic(self)
    }

    fn check_indexes(&self) -> Result<(), String> {
        let derived = Self::from_rows(self.rows(), self.applied_index).map_err(|e| e.to_string())?;
        let mut mine = self.clone();
        // Not derivable, so not compared: the history of touches.
        mine.services.touch_all(self.revision());
        mine.hosts.fleet_touched = derived.hosts.fleet_touched;
        mine.hosts.room_touched = derived.hosts.room_touched;
        for (ours, theirs) in mine.services.iter().zip(derived.services.iter()) {
            same(&format!("service {}", ours.name), ours, theirs)?;
        }
        same("services", &mine.services, &derived.services)?;
        for ((id, ours), (_, theirs)) in mine.hosts.iter().zip(derived.hosts.iter()) {
            same(&format!("host {id}"), ours, theirs)?;
        }
        same("hosts", &mine.hosts, &derived.hosts)?;
        same("instances", &mine.instances, &derived.instances)?;
        same("events", &mine.events, &derived.events)?;
        same("tokens", &mine.tokens, &derived.tokens)?;
        same("dedup", &mine.dedup, &derived.dedup)?;
        same("sessions", &mine.sessions, &derived.sessions)?;
        match self.sessions.keys().find(|host| self.hosts.get(**host).is_none()) {
            Some(host) => Err(format!("a session of {host}, which has no row")),
            None => Ok(()),
        }
    }

    fn check_service(&self, entry: &ServiceEntry) -> Result<(), String> {
        let (name, record) = (&entry.name, &entry.record);
        let manifest = record.manifest.as_ref().ok_or(format!("service {name}: no manifest"))?;
        if manifest.name != record.name {
            return Err(format!("service {name}: manifest of {}", manifest.name));
        }
        if record.deployment.as_ref().map(|d| d.version) != Some(record.version) {
            return Err(format!("service {name}: deployment of another version than {}", record.version));
        }
        if record.deleting && entry.instances.is_empty() {
            return Err(format!("service {name}: deleting and empty, but still there"));
        }
        crate::jobs::check(entry)?;
        self.check_versions(entry)?;
        self.check_slots(entry)
    }

    fn check_versions(&self, entry: &ServiceEntry) -> Result<(), String> {
        let (name, record) = (&entry.name, &entry.record);
        let Some(newest) = entry.versions.last() else {
            return Err(format!("service {name}: no version row"));
        };
        if newest.version != record.version || newest.template_version != record.template_version {
            return Err(format!("service {name}: newest version row is {}", newest.version));
        }
        if entry.versions.first().map(|oldest| oldest.version) != Some(record.oldest_version) {
            return Err(format!("service {name}: oldest version is not {}", record.oldest_version));
        }
        for version in &entry.versions {
            if version.manifest.is_none() != (version.version == record.version) {
                return Err(format!("service {name}: version {} has its manifest wrong", version.version));
            }
        }
        let in_use = self.instances_of(name).map(|instance| instance.version).collect::<BTreeSet<_>>();
        // One more for the stable version, one for that which was stable until the newest deployment succeeded.
        if entry.versions.len() > VERSIONS_KEPT + 2 + in_use.len() {
            return Err(format!("service {name}: {} versions kept", entry.versions.len()));
        }
        for version in in_use.into_iter().chain((record.stable_version != 0).then_some(record.stable_version))
        {
            if entry.manifest(version).is_none() {
                return Err(format!("service {name}: version {version} is needed and not kept"));
            }
        }
        Ok(())
    }

    /// No two wanted instances of one template share an ordinal.
    fn check_slots(&self, entry: &ServiceEntry) -> Result<(), String> {
        if self.instances_of(&entry.name).any(|instance| !instance.wanted() && instance.fetch.is_some()) {
            return Err(format!("{}: one that is to stop fetches", entry.name));
        }
        let mut slots = BTreeSet::new();
        for instance in self.instances_of(&entry.name).filter(|instance| instance.wanted()) {
            if !slots.insert((instance.template_version, instance.ordinal)) {
                return Err(format!("{}: ordinal {} taken twice", entry.name, instance.ordinal));
            }
            if let Some(fetch) = &instance.fetch
                && (fetch.template_version != entry.record.template_version
                    || fetch.template_version == instance.template_version)
            {
                return Err(format!("{}: {} fetches for no successor", entry.name, instance.id()));
            }
            if entry.record.deleting && instance.epoch == 0 {
                return Err(format!("{}: placed while deleting", entry.name));
            }
        }
        Ok(())
    }

    fn check_hosts(&self) -> Result<(), String> {
        for (id, host) in self.hosts.iter() {
            let lost = host.record.status() == pb::HostStatus::Lost;
            let keyless = host.record.public_key_sha256.is_empty();
            if host.record.forgotten && !(lost && keyless && !host.instances.is_empty()) {
                return Err(format!("{id} is forgotten, yet it is empty, has a key or is not lost"));
            }
            for instance in self.instances_on(id) {
                if lost != instance.lost() && (lost || instance.lost()) {
                    return Err(format!("{} on {id}: lost is {lost}, observed otherwise", instance.id()));
                }
            }
        }
        Ok(())
    }

    fn check_ids(&self) -> Result<(), String> {
        let Some(cluster) = &self.cluster else { return Ok(()) };
        let host = self.hosts.iter().map(|(id, _)| id.0).max().unwrap_or_default();
        let instance = self.instances.keys().map(|id| id.0).max().unwrap_or_default();
        if host >= cluster.next_host_id || instance >= cluster.next_instance_id {
            return Err(format!("ids h-{host}, i-{instance} were not allotted"));
        }
        Ok(())
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, ours: &T, derived: &T) -> Result<(), String> {
    if ours == derived {
        return Ok(());
    }
    Err(format!("{what}: kept\n{ours:?}\nderived from rows\n{derived:?}"))
}
