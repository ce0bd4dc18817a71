//! The rules of `[isolation]` and `[rlimits]`.

use super::Rules;
use crate::manifest::definition::nearest;
use crate::manifest::tree::{Path, shorten};
use crate::{limits, pb};

const PATHS_MAX: usize = 64;
const PATH_BYTES_MAX: usize = 1024;

impl Rules {
    pub(super) fn isolation(&mut self, manifest: &pb::Manifest) {
        let Some(isolation) = &manifest.isolation else { return };
        self.capabilities(&isolation.capabilities);
        let lists = [("hide", &isolation.hide), ("read", &isolation.read), ("write", &isolation.write)];
        for (key, paths) in lists {
            self.paths(key, paths);
        }
        if !isolation.read.is_empty() && !isolation.landlock {
            self.at(&["isolation", "read"], "says nothing without landlock = true");
        }
        if !isolation.write.is_empty() && !isolation.landlock && !isolation.read_only {
            self.at(&["isolation", "write"], "says nothing without read_only = true or landlock = true");
        }
        if pb::SeccompPreset::try_from(isolation.seccomp).is_err() {
            self.at(&["isolation", "seccomp"], "must be one of standard, offline");
        }
        let unconfined = isolation.seccomp() == pb::SeccompPreset::Unspecified && !isolation.landlock;
        if isolation.new_privileges && !unconfined {
            let why = "contradicts landlock and seccomp, which a setuid program must not escape";
            self.at(&["isolation", "new_privileges"], why);
        }
        if isolation.seccomp() == pb::SeccompPreset::Offline && !manifest.ports.is_empty() {
            self.at(&["isolation", "seccomp"], "offline contradicts [ports]: it could not listen");
        }
    }

    fn capabilities(&mut self, capabilities: &[String]) {
        let path = Path::default().key("isolation").key("capabilities");
        for (index, name) in capabilities.iter().enumerate() {
            if limits::capability_number(name).is_some() {
                continue;
            }
            let names: Vec<String> = limits::capability_names().collect();
            let hint = match nearest(name, names.iter().map(String::as_str)) {
                Some(meant) => format!("; did you mean {meant:?}?"),
                None => ", such as \"CAP_NET_BIND_SERVICE\"".to_owned(),
            };
            self.broken(path.index(index), format!("{:?} is not a capability{hint}", shorten(name)));
        }
    }

    fn paths(&mut self, key: &str, paths: &[String]) {
        let path = Path::default().key("isolation").key(key);
        if paths.len() > PATHS_MAX {
            self.broken(path.clone(), format!("at most {PATHS_MAX} paths, not {}", paths.len()));
        }
        for (index, given) in paths.iter().enumerate() {
            let why = if !given.starts_with('/') || given.split('/').any(|part| part == "..") {
                format!("must be absolute and without .., such as \"/srv\", not {:?}", shorten(given))
            } else if given.contains('\0') || given.len() > PATH_BYTES_MAX {
                format!("is no path of at most {PATH_BYTES_MAX} bytes")
            } else if key == "hide" && given.trim_matches('/').is_empty() {
                "hides everything, so no program could start".to_owned()
            } else {
                continue;
            };
            self.broken(path.index(index), why);
        }
    }

    pub(super) fn rlimits(&mut self, manifest: &pb::Manifest) {
        for name in manifest.rlimits.keys() {
            if limits::rlimit_number(name).is_none() {
                let why = format!("is no limit; one of {}", limits::RLIMIT_NAMES.join(", "));
                self.at(&["rlimits", name], why);
            }
        }
    }
}
