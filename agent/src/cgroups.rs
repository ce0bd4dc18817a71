//! Where this agent's control groups are and which limits they can enforce.
//!
//! Identity, "is it empty" and kill need only a cgroup2 hierarchy, with or without controllers; limits use
//! whichever controllers exist, v2 or v1. All our groups lie below the agent's own, or below that of the unit that was
//! made for them (see `unit`): `<mount>/<path>/nave-<cluster>-<host>/<service>/<instance>-<epoch>`, so that what was
//! delegated to us is never left and two agents on a machine never meet. The keeper makes the directories; here are the
//! names.

mod adjust;
mod tidy;
mod unit;

use std::path::{Path, PathBuf};

use nave_proto::ids::{ClusterId, HostId};
use nave_proto::pb;

pub use unit::services_unit;

/// Group that keeper and agent move to when theirs must hand controllers to its children: on cgroup2 a group
/// with controllers for its children may hold no process itself.
const LEAF: &str = "nave-keeper";
/// A fork bomb ends here instead of taking the host's pids with it; far above what real services use.
const PIDS_MAX: u32 = 16_384;
/// Scheduler period for quotas, the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// The smallest quota that the kernel takes.
const CPU_QUOTA_US_MIN: u64 = 1_000;

/// One controller that can limit our services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Controller {
    Cpu,
    Memory,
    Pids,
}

impl Controller {
    pub(crate) const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }
}

/// Where a controller's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the cgroup2 hierarchy.
    V2,
    /// In a hierarchy of its own; our own directory there.
    V1(PathBuf),
    /// Not at all, and why, for people.
    Nowhere(String),
}

/// What `/proc` says of the hierarchies, before anything was tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Hierarchies {
    v2: Option<PathBuf>,
    v1: Vec<(String, PathBuf)>,
}

/// What this agent can do with control groups.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    /// The directory that our folder is in, in the cgroup2 hierarchy, or why there is none.
    v2: Result<PathBuf, String>,
    places: Vec<(Controller, Place)>,
    /// `nave-<cluster>-<host>`.
    folder: String,
    /// Our own unit's directory, when services live in that of another: those of an earlier agent may still be below it.
    former: Option<PathBuf>,
}

/// The directories and limit files of one instance, as the keeper's orders want them.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct InstanceCgroup {
    pub(crate) cgroup2: String,
    pub(crate) cgroup1: Vec<String>,
    pub(crate) files: Vec<pb::FileWrite>,
}

impl Cgroups {
    /// Looks at this machine; `keepers` are the pids that may be moved to a leaf group (keeper and agent).
    pub(crate) fn detect(keepers: &[u32]) -> Self {
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let hierarchies = parse_hierarchies(&mountinfo, &own);
        let own = match hierarchies.v2 {
            None => Err("no cgroup2 hierarchy is mounted".to_owned()),
            Some(path) if !is_writable(&path) => {
                Err(format!("the agent may not write in {}", path.display()))
            }
            Some(path) => Ok(path),
        };
        // Where limits are v1's, the agent's own group has no controllers to hand on and is in nobody's way.
        let beside = own.as_deref().ok().filter(|_| hierarchies.v1.is_empty()).and_then(unit::beside);
        let (v2, former) = match beside {
            Some(services) => (Ok(services), own.ok()),
            None => (own, None),
        };
        let enabled = v2.as_ref().map(|path| match former {
            // Nobody is in there but who holds it for us.
            Some(_) => enable_controllers(path, unit::HOLDER, &|_| true),
            None => enable_controllers(path, LEAF, &|pid| keepers.contains(&pid)),
        });
        let places = Controller::ALL
            .into_iter()
            .map(|controller| (controller, place(controller, &hierarchies.v1, &v2, &enabled)))
            .collect();
        Self { v2, places, folder: "nave".to_owned(), former }
    }

    /// Names our folder, once this host is known.
    pub(crate) fn named(self, cluster: ClusterId, host: HostId) -> Self {
        Self { folder: format!("nave-{cluster}-{host}"), ..self }
    }

    /// The directories of all our services' groups in the cgroup2 hierarchy.
    pub(crate) fn folders(&self) -> Vec<PathBuf> {
        let places = self.v2.as_ref().ok().into_iter().chain(&self.former);
        places.map(|place| place.join(&self.folder)).collect()
    }

    /// `Err` says why there is no cgroup2 for us.
    pub(crate) fn v2(&self) -> Result<&Path, &str> {
        self.v2.as_deref().map_err(String::as_str)
    }

    pub(crate) fn place(&self, controller: Controller) -> &Place {
        let found = self.places.iter().find(|(other, _)| *other == controller);
        &found.expect("detect() fills in every controller").1
    }

    /// The groups of one instance and the limits that `resources` asks for. Looks whether it lives where an earlier agent
    /// had started it.
    pub(crate) fn instance(&self, service: &str, name: &str, resources: &pb::Resources) -> InstanceCgroup {
        let below = |own: &Path| own.join(&self.folder).join(service).join(name);
        let former = self.former.as_ref().filter(|own| unit::is_populated(&below(own)));
        let place_v2 = former.map_or(self.v2.as_ref(), Ok);
        let mut group = InstanceCgroup::default();
        if let Ok(own) = place_v2 {
            group.cgroup2 = below(own).display().to_string();
            group.files.extend(self.pass_down_controllers(own, service));
        }
        for (controller, place) in &self.places {
            let (dir, v2) = match (place, place_v2) {
                (Place::V2, Ok(own)) => (below(own), true),
                (Place::V1(own), _) => (below(own), false),
                (Place::V2, Err(_)) | (Place::Nowhere(_), _) => continue,
            };
            if !v2 {
                group.cgroup1.push(dir.display().to_string());
            }
            group.files.extend(limits(*controller, v2, &dir, resources));
        }
        group
    }

    /// Each level must hand its controllers to the next one.
    fn pass_down_controllers(&self, own: &Path, service: &str) -> Vec<pb::FileWrite> {
        let wanted: Vec<String> = self
            .places
            .iter()
            .filter(|(_, place)| *place == Place::V2)
            .map(|(controller, _)| format!("+{}", controller.name()))
            .collect();
        if wanted.is_empty() {
            return Vec::new();
        }
        let folder = own.join(&self.folder);
        [folder.clone(), folder.join(service)]
            .iter()
            .map(|dir| write(&dir.join("cgroup.subtree_control"), wanted.join(" "), false))
            .collect()
    }
}

fn place(
    controller: Controller,
    v1: &[(String, PathBuf)],
    v2: &Result<PathBuf, String>,
    enabled: &Result<Result<Vec<String>, String>, &String>,
) -> Place {
    let name = controller.name();
    if let Some((_, path)) = v1.iter().find(|(other, _)| other == name) {
        return match is_writable(path) {
            true => Place::V1(path.clone()),
            false => Place::Nowhere(format!("the agent may not write in {}", path.display())),
        };
    }
    match (v2, enabled) {
        (Err(why), _) => Place::Nowhere(why.clone()),
        (Ok(_), Ok(Ok(enabled))) if enabled.iter().any(|other| other == name) => Place::V2,
        (Ok(_), Ok(Err(why))) => Place::Nowhere(why.clone()),
        (Ok(path), Ok(Ok(_)) | Err(_)) => {
            Place::Nowhere(format!("the kernel offers no {name} controller in {}", path.display()))
        }
    }
}

/// Gives the children of a group every controller that it has, and says which those are. Who `may_move` is put in `leaf`
/// for that.
fn enable_controllers(own: &Path, leaf: &str, may_move: &dyn Fn(u32) -> bool) -> Result<Vec<String>, String> {
    let read = |name: &str| std::fs::read_to_string(own.join(name)).unwrap_or_default();
    let wanted: Vec<String> = read("cgroup.controllers")
        .split_whitespace()
        .filter(|name| Controller::ALL.iter().any(|controller| controller.name() == *name))
        .map(str::to_owned)
        .collect();
    let missing = |active: &str| {
        wanted.iter().filter(|name| !active.split_whitespace().any(|other| other == *name)).count()
    };
    if missing(&read("cgroup.subtree_control")) == 0 {
        return Ok(wanted);
    }
    // The real root (the only group without cgroup.type) may hold processes all the same.
    if own.join("cgroup.type").exists() {
        move_to_leaf(own, leaf, may_move)?;
    }
    let request: Vec<String> = wanted.iter().map(|name| format!("+{name}")).collect();
    let control = own.join("cgroup.subtree_control");
    std::fs::write(&control, request.join(" "))
        .map_err(|e| format!("writing {} failed: {e}", control.display()))?;
    Ok(wanted)
}

/// Only when nobody lives in the group but who `may_move`: others are not ours to move.
fn move_to_leaf(own: &Path, leaf: &str, may_move: &dyn Fn(u32) -> bool) -> Result<(), String> {
    let procs = std::fs::read_to_string(own.join("cgroup.procs")).unwrap_or_default();
    let pids: Vec<u32> = procs.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
    if let Some(stranger) = pids.iter().find(|pid| !may_move(**pid)) {
        return Err(format!(
            "other processes (pid {stranger}) share the agent's control group {}; run it as a unit of its own with Delegate=yes",
            own.display()
        ));
    }
    let leaf = own.join(leaf);
    let failed = |e: std::io::Error| format!("moving to {} failed: {e}", leaf.display());
    if !leaf.is_dir() {
        std::fs::create_dir(&leaf).map_err(failed)?;
    }
    for pid in pids {
        std::fs::write(leaf.join("cgroup.procs"), pid.to_string()).map_err(failed)?;
    }
    Ok(())
}

/// Reads `/proc/self/mountinfo` and `/proc/self/cgroup` into our own directory per hierarchy.
fn parse_hierarchies(mountinfo: &str, own: &str) -> Hierarchies {
    let mut found = Hierarchies::default();
    for line in mountinfo.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
        let mut fields = mount.split(' ');
        let (Some(root), Some(point)) = (fields.nth(3), fields.next()) else { continue };
        let mut fields = filesystem.split(' ');
        match fields.next() {
            Some("cgroup2") if found.v2.is_none() => {
                found.v2 = own_path(own, "").map(|path| join_mount(root, point, &path));
            }
            Some("cgroup") => {
                let options = fields.nth(1).unwrap_or_default();
                for controller in Controller::ALL.map(Controller::name) {
                    let Some(path) = options
                        .split(',')
                        .any(|option| option == controller)
                        .then(|| own_path(own, controller))
                        .flatten()
                    else {
                        continue;
                    };
                    found.v1.push((controller.to_owned(), join_mount(root, point, &path)));
                }
            }
            _ => {}
        }
    }
    found
}

/// Our path in the hierarchy of `controller`, or in cgroup2 when it is empty.
fn own_path(own: &str, controller: &str) -> Option<String> {
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let fits = match controller {
            "" => controllers.is_empty(),
            _ => controllers.split(',').any(|other| other == controller),
        };
        fits.then(|| path.to_owned())
    })
}

/// A mount may show only a part of its hierarchy, from `root` down. Our leaf stands for the group above it.
fn join_mount(root: &str, point: &str, path: &str) -> PathBuf {
    let below = path.strip_prefix(root).unwrap_or(path);
    let below = below.trim_start_matches('/');
    let below = below.strip_suffix(LEAF).map_or(below, |above| above.trim_end_matches('/'));
    match below {
        "" => PathBuf::from(unescape(point)),
        _ => Path::new(&unescape(point)).join(below),
    }
}

/// mountinfo writes space, tab, newline and backslash in octal.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

fn is_writable(path: &Path) -> bool {
    nix::unistd::access(path, nix::unistd::AccessFlags::W_OK | nix::unistd::AccessFlags::X_OK).is_ok()
}

fn write(path: &Path, value: String, required: bool) -> pb::FileWrite {
    pb::FileWrite { path: path.display().to_string(), value, required }
}

fn limits(controller: Controller, v2: bool, dir: &Path, resources: &pb::Resources) -> Vec<pb::FileWrite> {
    match controller {
        Controller::Cpu => cpu_limits(v2, dir, resources),
        Controller::Memory => memory_limits(v2, dir, resources),
        Controller::Pids => {
            let (pids, required) =
                if resources.pids > 0 { (resources.pids, true) } else { (PIDS_MAX, false) };
            vec![write(&dir.join("pids.max"), pids.to_string(), required)]
        }
    }
}

/// A reservation becomes a weight (one core is the default weight), a quota a quota.
fn cpu_limits(v2: bool, dir: &Path, resources: &pb::Resources) -> Vec<pb::FileWrite> {
    let mut files = Vec::new();
    let millicores = resources.cpu_millicores;
    if millicores > 0 {
        files.push(match v2 {
            true => write(&dir.join("cpu.weight"), (millicores / 10).clamp(1, 10_000).to_string(), false),
            false => {
                let shares = millicores.saturating_mul(1024) / 1000;
                write(&dir.join("cpu.shares"), shares.clamp(2, 262_144).to_string(), false)
            }
        });
    }
    let quota_us = resources.cpu_max_millicores.saturating_mul(CPU_PERIOD_US) / 1000;
    let quota_us = (quota_us > 0).then(|| quota_us.max(CPU_QUOTA_US_MIN));
    match (v2, quota_us) {
        (true, Some(us)) => files.push(write(&dir.join("cpu.max"), format!("{us} {CPU_PERIOD_US}"), true)),
        (true, None) => files.push(write(&dir.join("cpu.max"), "max".to_owned(), false)),
        (false, Some(us)) => {
            files.push(write(&dir.join("cpu.cfs_period_us"), CPU_PERIOD_US.to_string(), false));
            files.push(write(&dir.join("cpu.cfs_quota_us"), us.to_string(), true));
        }
        (false, None) => files.push(write(&dir.join("cpu.cfs_quota_us"), "-1".to_owned(), false)),
    }
    files
}

/// A hard limit, swap included: a service that outgrows it is killed, it does not slow the whole host down.
fn memory_limits(v2: bool, dir: &Path, resources: &pb::Resources) -> Vec<pb::FileWrite> {
    let mut files = hard_memory_limit(v2, dir, resources.memory_bytes);
    // Soft in the kernel's words as well: v2 takes memory back and slows down, v1 takes it back when the host is short.
    let soft = (resources.memory_soft_bytes > 0).then(|| resources.memory_soft_bytes.to_string());
    files.push(match v2 {
        true => write(&dir.join("memory.high"), soft.unwrap_or_else(|| "max".to_owned()), false),
        false => {
            write(&dir.join("memory.soft_limit_in_bytes"), soft.unwrap_or_else(|| "-1".to_owned()), false)
        }
    });
    files
}

fn hard_memory_limit(v2: bool, dir: &Path, bytes: u64) -> Vec<pb::FileWrite> {
    match (v2, bytes) {
        (true, 0) => vec![write(&dir.join("memory.max"), "max".to_owned(), false)],
        (true, _) => vec![
            write(&dir.join("memory.max"), bytes.to_string(), true),
            write(&dir.join("memory.swap.max"), "0".to_owned(), false),
            write(&dir.join("memory.oom.group"), "1".to_owned(), false),
        ],
        // The limit with swap may never be below the one without, so it is lifted while that one moves.
        (false, 0) => vec![
            write(&dir.join("memory.memsw.limit_in_bytes"), "-1".to_owned(), false),
            write(&dir.join("memory.limit_in_bytes"), "-1".to_owned(), false),
        ],
        (false, _) => vec![
            write(&dir.join("memory.memsw.limit_in_bytes"), "-1".to_owned(), false),
            write(&dir.join("memory.limit_in_bytes"), bytes.to_string(), true),
            write(&dir.join("memory.memsw.limit_in_bytes"), bytes.to_string(), false),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID_MOUNTS: &str = "\
28 22 0:24 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
29 28 0:25 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
32 28 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
37 28 0:33 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
38 28 0:34 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const HYBRID_OWN: &str = "\
9:name=systemd:/
4:memory:/jobs/7
1:cpu,cpuacct:/
0::/
";

    #[test]
    fn a_hybrid_machine_has_identity_in_v2_and_limits_in_v1() {
        let found = parse_hierarchies(HYBRID_MOUNTS, HYBRID_OWN);
        assert_eq!(found.v2, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(
            found.v1,
            [
                ("cpu".to_owned(), PathBuf::from("/sys/fs/cgroup/cpu,cpuacct")),
                ("memory".to_owned(), PathBuf::from("/sys/fs/cgroup/memory/jobs/7")),
            ]
        );
    }

    #[test]
    fn a_unit_on_a_v2_machine_stays_below_its_own_group_and_above_its_leaf() {
        let mounts = "25 21 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let v2 = |own: &str| parse_hierarchies(mounts, own).v2.unwrap();
        assert_eq!(
            v2("0::/system.slice/nave.service\n"),
            Path::new("/sys/fs/cgroup/system.slice/nave.service")
        );
        assert_eq!(
            v2("0::/system.slice/nave.service/nave-keeper\n"),
            Path::new("/sys/fs/cgroup/system.slice/nave.service")
        );
    }

    #[test]
    fn a_mount_that_shows_only_a_container_is_joined_below_its_root() {
        let mounts = "25 21 0:22 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let found = parse_hierarchies(mounts, "0::/docker/ab/unit\n");
        assert_eq!(found.v2, Some("/sys/fs/cgroup/unit".into()));
    }

    fn values(files: &[pb::FileWrite]) -> Vec<(String, String)> {
        let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        files.iter().map(|file| (name(&file.path), file.value.clone())).collect()
    }

    #[test]
    fn resources_become_the_files_of_each_hierarchy() {
        let resources = pb::Resources {
            cpu_millicores: 500,
            cpu_max_millicores: 1500,
            memory_bytes: 128 << 20,
            memory_soft_bytes: 96 << 20,
            pids: 100,
            ..Default::default()
        };
        let dir = Path::new("/c");
        let shown = |list: &[(String, String)]| {
            list.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("; ")
        };
        let v2 = [cpu_limits(true, dir, &resources), memory_limits(true, dir, &resources)].concat();
        assert_eq!(
            shown(&values(&v2)),
            "cpu.weight=50; cpu.max=150000 100000; memory.max=134217728; memory.swap.max=0; memory.oom.group=1; \
             memory.high=100663296"
        );
        let v1 = [cpu_limits(false, dir, &resources), memory_limits(false, dir, &resources)].concat();
        assert_eq!(
            shown(&values(&v1)),
            "cpu.shares=512; cpu.cfs_period_us=100000; cpu.cfs_quota_us=150000; memory.memsw.limit_in_bytes=-1; \
             memory.limit_in_bytes=134217728; memory.memsw.limit_in_bytes=134217728; \
             memory.soft_limit_in_bytes=100663296"
        );
        assert_eq!(shown(&values(&limits(Controller::Pids, true, dir, &resources))), "pids.max=100");
    }

    #[test]
    fn an_instance_gets_a_group_per_hierarchy_named_by_cluster_and_host() {
        let cgroups = Cgroups {
            v2: Ok("/u".into()),
            places: vec![
                (Controller::Cpu, Place::Nowhere("no".into())),
                (Controller::Memory, Place::V1("/m/jobs/7".into())),
                (Controller::Pids, Place::V2),
            ],
            folder: "nave-00c1-h-3".into(),
            former: None,
        };
        let group = cgroups.instance("web", "i-42-1", &pb::Resources::default());
        assert_eq!(group.cgroup2, "/u/nave-00c1-h-3/web/i-42-1");
        assert_eq!(group.cgroup1, ["/m/jobs/7/nave-00c1-h-3/web/i-42-1"]);
        let paths: Vec<_> = group.files.iter().map(|file| file.path.as_str()).collect();
        assert!(paths.starts_with(&[
            "/u/nave-00c1-h-3/cgroup.subtree_control",
            "/u/nave-00c1-h-3/web/cgroup.subtree_control"
        ]));
        assert!(paths.contains(&"/u/nave-00c1-h-3/web/i-42-1/pids.max"));
    }
}
