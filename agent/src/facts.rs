//! What this machine is and can enforce, as told to the hub at every hello: capacity for placement,
//! capabilities for constraints, and a sentence for people about each thing it cannot do.

use nave_proto::{FETCHES_AHEAD, pb};

use crate::cgroups::{Cgroups, Controller, Place};
use crate::clock;
use crate::config::AgentConfig;

/// Kept for keeper and agent, so that a host filled to the brim can still be managed.
const CPU_RESERVE_MILLICORES: u64 = 100;
/// Keeper and agent need about 30 MiB; the rest is for the system's own services.
const MEMORY_RESERVE_BYTES: u64 = 256 * 1024 * 1024;
/// More than any machine has: what "no limit" looks like in a v1 memory group.
const MEMORY_UNLIMITED_BYTES: u64 = 1 << 60;

/// Measures the machine; `address` is the agent's own, as others dial it.
pub(crate) fn facts(config: &AgentConfig, cgroups: &Cgroups, address: String) -> pb::HostFacts {
    let root = nix::unistd::geteuid().is_root();
    let (capabilities, lacks) = capabilities(cgroups, root);
    pb::HostFacts {
        name: host_name(config),
        address,
        cpu_millicores: match config.cpu_millicores {
            0 => cpu_for_services(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
            given => given,
        },
        memory_bytes: match config.memory_bytes {
            0 => memory_for_services(machine_memory_bytes(), memory_limit_bytes(cgroups)),
            given => given,
        },
        labels: config.labels.clone(),
        capabilities,
        lacks,
        os: std::env::consts::OS.to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        kernel: read_line("/proc/sys/kernel/osrelease"),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        address_prefix: config.address_prefix.clone(),
        boot_id: clock::boot_id().unwrap_or_default(),
        // The directory's, which `run` knows.
        place: 0,
        alarms: Vec::new(),
    }
}

/// The configured name, else the machine's, made to fit.
pub(crate) fn host_name(config: &AgentConfig) -> String {
    match config.name.as_str() {
        "" => fit_host_name(&read_line("/proc/sys/kernel/hostname")),
        name => name.to_owned(),
    }
}

fn fit_host_name(name: &str) -> String {
    let kept: String =
        name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')).take(63).collect();
    match kept.trim_start_matches(['-', '.', '_']) {
        "" => "host".to_owned(),
        kept => kept.to_owned(),
    }
}

fn cpu_for_services(cores: usize) -> u64 {
    let all = u64::try_from(cores).unwrap_or(u64::MAX).saturating_mul(1000);
    all.saturating_sub(CPU_RESERVE_MILLICORES)
}

fn memory_for_services(machine: u64, limit: Option<u64>) -> u64 {
    let all = machine.min(limit.unwrap_or(u64::MAX));
    // On a tiny machine half is better than nothing.
    all.saturating_sub(MEMORY_RESERVE_BYTES).max(all / 2)
}

fn machine_memory_bytes() -> u64 {
    parse_mem_total(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()).unwrap_or_default()
}

fn parse_mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The limit of the agent's own group, which binds all below it.
fn memory_limit_bytes(cgroups: &Cgroups) -> Option<u64> {
    let file = match (cgroups.place(Controller::Memory), cgroups.v2()) {
        (Place::V1(own), _) => own.join("memory.limit_in_bytes"),
        (Place::V2 | Place::Nowhere(_), Ok(own)) => own.join("memory.max"),
        (Place::V2 | Place::Nowhere(_), Err(_)) => return None,
    };
    let limit = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
    (limit < MEMORY_UNLIMITED_BYTES).then_some(limit)
}

/// Names for constraints, sentences for people.
fn capabilities(cgroups: &Cgroups, root: bool) -> (Vec<String>, Vec<String>) {
    let mut can = Vec::new();
    let mut lacks = Vec::new();
    match cgroups.v2() {
        Ok(_) => can.push("cgroup2".to_owned()),
        Err(why) => lacks.extend([
            format!("children that a process leaves behind cannot be found and stopped for certain: {why}"),
            format!("callers are told apart by their user alone, so services that share one are one: {why}"),
        ]),
    }
    for (controller, names, what) in [
        (Controller::Cpu, &["cpu_weight", "cpu_max"][..], "CPU reservations and quotas are not enforced"),
        (Controller::Memory, &["memory_limit"], "memory limits are not enforced"),
        (Controller::Pids, &["pids_limit"], "the number of processes of a service is not limited"),
    ] {
        match cgroups.place(controller) {
            Place::V1(_) | Place::V2 => can.extend(names.iter().map(|name| (*name).to_owned())),
            Place::Nowhere(why) => lacks.push(format!("{what}: {why}")),
        }
    }
    if let Place::V1(_) = cgroups.place(Controller::Memory) {
        let what =
            "beyond resources.memory_soft memory is taken back only while the whole host is short of it";
        lacks.push(format!("{what}: its memory controller is of cgroup v1"));
    }
    match root {
        true => can.extend(["users", "private_tmp", "read_only", "capabilities"].map(str::to_owned)),
        false => lacks.extend(
            [
                "services run as the agent's own user and are not protected from each other",
                "services share /tmp, and isolation.read_only, hide and capabilities are refused",
                "instances' own ports are open to every process of this host",
            ]
            .map(|what| format!("{what}: the agent is not root")),
        ),
    }
    match nave_keeper::sandbox::has_landlock() {
        true => can.push("landlock".to_owned()),
        false => lacks.push("isolation.landlock is refused: this kernel has no Landlock".to_owned()),
    }
    match has_seccomp() {
        true => can.push("seccomp".to_owned()),
        false => lacks.push("isolation.seccomp is refused: this kernel has no seccomp filters".to_owned()),
    }
    can.push(FETCHES_AHEAD.to_owned());
    (can, lacks)
}

fn has_seccomp() -> bool {
    std::path::Path::new("/proc/sys/kernel/seccomp/actions_avail").exists()
}

fn read_line(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_the_smaller_of_machine_and_group_less_the_reserve() {
        let meminfo = "MemTotal:       24683340 kB\nMemFree:        22780000 kB\n";
        let machine = parse_mem_total(meminfo).unwrap();
        assert_eq!(machine, 24_683_340 * 1024);
        assert_eq!(memory_for_services(machine, None), machine - MEMORY_RESERVE_BYTES);
        assert_eq!(memory_for_services(machine, Some(1 << 30)), (1 << 30) - MEMORY_RESERVE_BYTES);
        assert_eq!(memory_for_services(256 << 20, None), 128 << 20);
    }

    #[test]
    fn host_names_are_made_to_fit() {
        assert_eq!(fit_host_name("web-1.example"), "web-1.example");
        assert_eq!(fit_host_name("-mein rechner"), "meinrechner");
        assert_eq!(fit_host_name("(none)"), "none");
        assert_eq!(fit_host_name("…"), "host");
    }

    #[test]
    fn this_machine_has_capacity_and_says_what_it_lacks() {
        let config = AgentConfig::new("/nowhere".into(), Vec::new());
        let cgroups = Cgroups::detect(&[]);
        let facts = facts(&config, &cgroups, "127.0.0.1:7410".into());
        assert!(facts.cpu_millicores > 0 && facts.memory_bytes > 0, "{facts:?}");
        assert_eq!(facts.capabilities.iter().any(|c| c == "cgroup2"), cgroups.v2().is_ok());
        let soft = facts.lacks.iter().any(|sentence| sentence.contains("memory_soft"));
        assert_eq!(soft, matches!(cgroups.place(Controller::Memory), Place::V1(_)));
        for sentence in &facts.lacks {
            assert!(sentence.contains(": "), "a reason is missing: {sentence}");
        }
    }
}
