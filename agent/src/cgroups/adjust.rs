//! New limits for a cgroup that somebody is in. Unlike those of a start they can come too late: nobody is killed because
//! a limit was lowered below what is used already.

use std::fs;
use std::io;
use std::path::Path;

use nave_agent_core::supervisor::LimitRefused;
use nave_proto::manifest::format_size;
use nave_proto::pb;

use super::{Cgroups, Controller, Place, limits};

/// What a group has that was never given a weight.
const DEFAULT_WEIGHT: [(&str, &str); 2] = [("cpu.weight", "100"), ("cpu.shares", "1024")];

impl Cgroups {
    /// Gives the cgroups of one instance these limits, and says which they did not take. Blocks.
    pub(crate) fn adjust(&self, service: &str, name: &str, resources: &pb::Resources) -> Vec<LimitRefused> {
        let group = self.instance(service, name, resources);
        let mut refused = Vec::new();
        let mut v1 = group.cgroup1.iter();
        for (controller, place) in &self.places {
            let (dir, v2) = match place {
                Place::V2 => (Path::new(&group.cgroup2), true),
                Place::V1(_) => match v1.next() {
                    Some(dir) => (Path::new(dir), false),
                    None => continue,
                },
                Place::Nowhere(why) => {
                    if is_asked(*controller, resources) {
                        let what = format!("{}: this host cannot enforce it, {why}", controller.name());
                        refused.push(LimitRefused { what, may_pass: false });
                    }
                    continue;
                }
            };
            if *controller == Controller::Memory
                && let Some(too_low) = below_use(v2, dir, resources.memory_bytes)
            {
                refused.push(too_low);
                continue;
            }
            if *controller == Controller::Cpu && resources.cpu_millicores == 0 {
                let [v2_file, v1_file] = DEFAULT_WEIGHT;
                let (file, value) = if v2 { v2_file } else { v1_file };
                let _best_effort = change(&dir.join(file), value);
            }
            let files = limits(*controller, v2, dir, resources);
            if *controller == Controller::Memory && is_set(v2, dir, resources.memory_bytes) {
                // Writing it anew would lift it for a moment.
                write_all(files.iter().filter(|file| !is_hard_limit(&file.path)), &mut refused);
            } else {
                write_all(files.iter(), &mut refused);
            }
            if *controller == Controller::Memory
                && !v2
                && let Some(kept) =
                    read(&dir.join(limit_file(v2))).filter(|kept| *kept != resources.memory_bytes)
            {
                // Lifted so that the other could move, which it did not.
                let _best_effort = change(&dir.join("memory.memsw.limit_in_bytes"), &kept.to_string());
            }
            if *controller == Controller::Memory && v2 && resources.memory_bytes == 0 {
                let _best_effort = change(&dir.join("memory.swap.max"), "max");
            }
        }
        refused
    }
}

fn is_asked(controller: Controller, resources: &pb::Resources) -> bool {
    match controller {
        Controller::Cpu => resources.cpu_max_millicores > 0,
        Controller::Memory => resources.memory_bytes > 0,
        Controller::Pids => resources.pids > 0,
    }
}

fn write_all<'f>(files: impl Iterator<Item = &'f pb::FileWrite>, refused: &mut Vec<LimitRefused>) {
    for file in files {
        if let Err(error) = change(Path::new(&file.path), &file.value)
            && file.required
        {
            let name = Path::new(&file.path).file_name().unwrap_or_default().to_string_lossy().into_owned();
            let what = format!("{name} = {}: {error}", file.value);
            refused.push(LimitRefused { what, may_pass: error.raw_os_error() == Some(libc::EBUSY) });
        }
    }
}

/// Only when it says something else.
fn change(path: &Path, value: &str) -> io::Result<()> {
    match fs::read_to_string(path) {
        Ok(now) if now.trim() == value => Ok(()),
        Ok(_) | Err(_) => fs::write(path, value),
    }
}

fn limit_file(v2: bool) -> &'static str {
    if v2 { "memory.max" } else { "memory.limit_in_bytes" }
}

fn is_hard_limit(path: &str) -> bool {
    ["memory.max", "limit_in_bytes"].iter().any(|end| path.ends_with(end))
        && !path.ends_with("soft_limit_in_bytes")
}

fn is_set(v2: bool, dir: &Path, bytes: u64) -> bool {
    bytes > 0 && read(&dir.join(limit_file(v2))) == Some(bytes)
}

fn read(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Whether what is in use and cannot be taken back is more than the new limit: the kernel would kill for it.
fn below_use(v2: bool, dir: &Path, bytes: u64) -> Option<LimitRefused> {
    let used = crate::pressure::held_bytes(v2, dir)?;
    if bytes == 0 || used < bytes || is_set(v2, dir, bytes) {
        return None;
    }
    let mebibytes = |bytes: u64| format_size(bytes >> 20 << 20);
    let what = format!(
        "memory of {}: it uses {}, so it keeps the limit that it has until it uses less or is started again",
        format_size(bytes),
        mebibytes(used)
    );
    Some(LimitRefused { what, may_pass: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A v2 directory made of plain files.
    fn group(dir: &Path, used: u64) -> Cgroups {
        let own = dir.join("nave/web/i-1-1");
        fs::create_dir_all(&own).unwrap();
        for (file, value) in [
            ("cpu.weight", "50"),
            ("cpu.max", "max 100000"),
            ("memory.max", "134217728"),
            ("memory.stat", &format!("anon {used}\nshmem 0\nfile 900\n")),
            ("pids.max", "16384"),
        ] {
            fs::write(own.join(file), value).unwrap();
        }
        let places = vec![
            (Controller::Cpu, Place::V2),
            (Controller::Memory, Place::V2),
            (Controller::Pids, Place::Nowhere("there is none".to_owned())),
        ];
        Cgroups { v2: Ok(dir.to_owned()), places, folder: "nave".to_owned(), former: None }
    }

    fn says(dir: &Path, file: &str) -> String {
        fs::read_to_string(dir.join("nave/web/i-1-1").join(file)).unwrap()
    }

    #[test]
    fn limits_are_changed_where_they_are_and_one_below_what_is_used_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = group(dir.path(), 20 << 20);
        let asked = pb::Resources { cpu_max_millicores: 500, memory_bytes: 64 << 20, ..Default::default() };
        assert_eq!(cgroups.adjust("web", "i-1-1", &asked), []);
        assert_eq!(says(dir.path(), "cpu.max"), "50000 100000");
        assert_eq!(says(dir.path(), "cpu.weight"), "100", "nothing is reserved any more");
        assert_eq!(says(dir.path(), "memory.max"), (64 << 20).to_string());

        let asked =
            pb::Resources { memory_bytes: 16 << 20, pids: 9, cpu_millicores: 250, ..Default::default() };
        let refused = cgroups.adjust("web", "i-1-1", &asked);
        let what: Vec<(&str, bool)> =
            refused.iter().map(|limit| (limit.what.as_str(), limit.may_pass)).collect();
        assert_eq!(
            what,
            [
                (
                    "memory of 16MiB: it uses 20MiB, so it keeps the limit that it has until it uses less or is started \
                     again",
                    true
                ),
                ("pids: this host cannot enforce it, there is none", false),
            ]
        );
        assert_eq!(says(dir.path(), "memory.max"), (64 << 20).to_string());
        assert_eq!(
            (says(dir.path(), "cpu.max"), says(dir.path(), "cpu.weight")),
            ("max".into(), "25".into())
        );
        assert_eq!(cgroups.adjust("web", "i-1-1", &pb::Resources::default()), []);
        assert_eq!(says(dir.path(), "memory.max"), "max");
    }
}
