//! The systemd unit that services live in, beside the one of keeper and agent.
//!
//! On cgroup2 a group that hands controllers to its children may hold no process itself. Did services with limits live
//! below the agent's own unit, systemd could not start a keeper there again while they run (status=219/CGROUP). So
//! `nave agent install` writes a second unit whose group holds services and a process that sleeps, and the agent's own
//! stays a leaf. What an agent of an earlier build started below its own unit is kept there until it is started anew.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::{Cgroups, Controller, Place};

/// Where the process that sleeps in the services' unit is put, out of the way of the controllers.
pub(super) const HOLDER: &str = "nave-holder";
/// A note to people names so many services; they are dealt with one after the other.
const NAMED_MAX: usize = 8;

/// The unit that holds the services of the agent that runs as the unit `agent`.
#[must_use]
pub fn services_unit(agent: &str) -> String {
    let name = agent.strip_suffix(".service").unwrap_or(agent);
    format!("{}-services.service", name.strip_suffix("-agent").unwrap_or(name))
}

/// The group of the services' unit, if the group `own` is that of a unit which has one and we may use it.
pub(super) fn beside(own: &Path) -> Option<PathBuf> {
    let group = own.with_file_name(services_unit(unit_name(own)?));
    // Processes go from our group to that one, so the one above both must let us.
    let above = group.parent()?.join("cgroup.procs");
    (super::is_writable(&group) && access(&above, AccessFlags::W_OK).is_ok()).then_some(group)
}

fn unit_name(group: &Path) -> Option<&str> {
    group.file_name()?.to_str().filter(|name| name.ends_with(".service"))
}

/// Whether somebody lives in a group or below it.
pub(super) fn is_populated(group: &Path) -> bool {
    let events = fs::read_to_string(group.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}

impl Cgroups {
    /// Why systemd cannot start the agent's unit again, for people; `None` when it can. Takes the controllers back from
    /// the unit's own group as soon as no service lives below it any more. Blocks.
    pub(crate) fn unit_lack(&self) -> Option<String> {
        match &self.former {
            Some(own) => free(own, &self.folder),
            None => crowded(self.v2.as_deref().ok()?, &self.places),
        }
    }
}

/// Of the unit's group `own`, which services of an earlier agent may still live below.
fn free(own: &Path, folder: &str) -> Option<String> {
    let unit = unit_name(own).unwrap_or_default();
    let control = own.join("cgroup.subtree_control");
    let active = fs::read_to_string(&control).unwrap_or_default();
    let folder = own.join(folder);
    let left = populated(&folder);
    if !left.is_empty() {
        return Some(still_there(unit, &left, !active.trim().is_empty()));
    }
    super::tidy::remove_all(&folder);
    let request: Vec<String> = active.split_whitespace().map(|name| format!("-{name}")).collect();
    if request.is_empty() {
        return None;
    }
    let written = fs::write(&control, request.join(" "));
    written
        .err()
        .map(|error| format!("{}: writing {} failed: {error}", cannot_start(unit), control.display()))
}

/// The services of which somebody lives.
fn populated(folder: &Path) -> Vec<String> {
    super::tidy::services(folder).into_iter().filter(|service| is_populated(&folder.join(service))).collect()
}

fn still_there(unit: &str, services: &[String], are_limited: bool) -> String {
    let named = services.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    let named = match services.len().saturating_sub(NAMED_MAX) {
        0 => named,
        more => format!("{named} and {more} more"),
    };
    match are_limited {
        true => format!(
            "{}: {named} still run in its own control group, as earlier versions had it; `nave restart` each of them",
            cannot_start(unit)
        ),
        // Whoever has taken them their limits could have the unit started, which is why we run.
        false => format!(
            "limits of {named} are not enforced: they still run in the control group of {unit}, as earlier versions had \
             it; `nave restart` each of them"
        ),
    }
}

fn cannot_start(unit: &str) -> String {
    format!("systemd cannot start {unit} again, it would fail with 219/CGROUP")
}

/// Of a unit whose own group services live below, controllers and all.
fn crowded(own: &Path, places: &[(Controller, Place)]) -> Option<String> {
    let unit = unit_name(own)?;
    let in_v2 = places.iter().any(|(_, place)| *place == Place::V2);
    (in_v2 && own.join("cgroup.type").exists()).then(|| {
        format!(
            "{} while services run: they live in its own control group; `nave agent install` writes a unit for them and \
             says how to go on",
            cannot_start(unit)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_services_unit_is_named_after_the_agents() {
        for (agent, services) in [
            ("nave-agent.service", "nave-services.service"),
            ("nave-agent", "nave-services.service"),
            ("nave.service", "nave-services.service"),
            ("edge-agent.service", "edge-services.service"),
            ("agent.service", "agent-services.service"),
        ] {
            assert_eq!(services_unit(agent), services);
        }
    }

    /// Directories as the kernel shows them, made of plain files.
    fn group(path: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(path).unwrap();
        for (name, text) in files {
            fs::write(path.join(name), text).unwrap();
        }
    }

    #[test]
    fn only_a_unit_with_one_beside_it_has_its_services_there() {
        let slice = tempfile::tempdir().unwrap();
        let own = slice.path().join("nave-agent.service");
        group(slice.path(), &[("cgroup.procs", "")]);
        group(&own, &[]);
        assert_eq!(beside(&own), None, "nobody has made it");
        let services = slice.path().join("nave-services.service");
        group(&services, &[]);
        assert_eq!(beside(&own), Some(services));
        assert_eq!(beside(&slice.path().join("session-1.scope")), None);
        assert_eq!(beside(Path::new("/")), None);
    }

    #[test]
    fn a_unit_is_freed_once_the_services_of_an_earlier_agent_have_left_it() {
        let slice = tempfile::tempdir().unwrap();
        let own = slice.path().join("nave-agent.service");
        let web = own.join("nave-c-h/web");
        let emptied_long_ago = own.join("nave-c-h/jobs/i-2-1");
        group(&own, &[("cgroup.subtree_control", "cpu memory pids\n")]);
        group(&web, &[("cgroup.events", "populated 1\nfrozen 0\n")]);
        fs::create_dir_all(&emptied_long_ago).unwrap();
        let places = Controller::ALL.map(|controller| (controller, Place::V2)).to_vec();
        let cgroups = Cgroups {
            v2: Ok(slice.path().join("nave-services.service")),
            places,
            folder: "nave-c-h".into(),
            former: Some(own.clone()),
        };
        let control = || fs::read_to_string(own.join("cgroup.subtree_control")).unwrap();
        let lack = cgroups.unit_lack().unwrap();
        assert!(lack.contains("nave-agent.service again") && lack.contains("web still run"), "{lack}");
        assert_eq!(control(), "cpu memory pids\n");
        fs::write(own.join("cgroup.subtree_control"), "\n").unwrap();
        let lack = cgroups.unit_lack().unwrap();
        assert!(lack.contains("limits of web are not enforced"), "by hand, so that it could start: {lack}");
        fs::write(own.join("cgroup.subtree_control"), "cpu memory pids\n").unwrap();
        fs::remove_file(web.join("cgroup.events")).unwrap();
        assert_eq!(cgroups.unit_lack(), None);
        assert_eq!(control(), "-cpu -memory -pids");
        assert!(!own.join("nave-c-h").exists());
    }

    #[test]
    fn what_runs_in_its_former_group_is_found_there_and_starts_anew_in_the_other() {
        let slice = tempfile::tempdir().unwrap();
        let (own, services) =
            (slice.path().join("nave-agent.service"), slice.path().join("nave-services.service"));
        let cgroups = Cgroups {
            v2: Ok(services.clone()),
            places: Controller::ALL.map(|controller| (controller, Place::V2)).to_vec(),
            folder: "nave-c-h".into(),
            former: Some(own.clone()),
        };
        let at = |place: &Path| place.join("nave-c-h/web/i-1-1");
        let found = || PathBuf::from(cgroups.instance("web", "i-1-1", &Default::default()).cgroup2);
        assert_eq!(found(), at(&services));
        group(&at(&own), &[("cgroup.events", "populated 1\nfrozen 0\n")]);
        assert_eq!(found(), at(&own));
        group(&at(&own), &[("cgroup.events", "populated 0\nfrozen 0\n")]);
        assert_eq!(found(), at(&services));
    }

    #[test]
    fn services_in_the_agents_own_unit_are_said_to_be_in_its_way() {
        let slice = tempfile::tempdir().unwrap();
        let lack = |name: &str, place: Place| {
            let own = slice.path().join(name);
            group(&own, &[("cgroup.type", "domain\n")]);
            let places = vec![(Controller::Memory, place)];
            Cgroups { v2: Ok(own), places, folder: "nave-c-h".into(), former: None }.unit_lack()
        };
        assert!(lack("nave-agent.service", Place::V2).unwrap().contains("nave agent install"));
        assert_eq!(lack("nave-agent.service", Place::V1("/m".into())), None, "a hybrid machine");
        assert_eq!(lack("session-1.scope", Place::V2), None);
    }
}
