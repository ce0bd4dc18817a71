//! The rules of `[hooks]`: each has a command, and an end.

use std::time::Duration;

use super::Rules;
use crate::manifest::tree::Path;
use crate::pb;
use crate::time::{format_duration, from_proto};

const TIMEOUT_MIN: Duration = Duration::from_millis(100);
const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

impl Rules {
    pub(super) fn hooks(&mut self, manifest: &pb::Manifest) {
        let Some(hooks) = &manifest.hooks else { return };
        let named = [
            ("pre_start", &hooks.pre_start),
            ("post_start", &hooks.post_start),
            ("pre_stop", &hooks.pre_stop),
            ("post_stop", &hooks.post_stop),
        ];
        if named.iter().all(|(_, hook)| hook.is_none()) {
            self.at(&["hooks"], "has no hook; add one of pre_start, post_start, pre_stop or post_stop");
        }
        for (name, hook) in named {
            let Some(hook) = hook else { continue };
            let path = ["hooks", name, "command"].iter().fold(Path::default(), |path, key| path.key(key));
            self.command(&path, &hook.command);
            let keys = ["hooks", name, "timeout"];
            let timeout = self.duration(&keys, hook.timeout.as_ref(), TIMEOUT_MIN, TIMEOUT_MAX);
            if name == "pre_stop" {
                self.within_grace(&keys, timeout, manifest);
            }
        }
    }

    /// The stop signal has to come while there is time left to obey it.
    fn within_grace(&mut self, keys: &[&str], timeout: Option<Duration>, manifest: &pb::Manifest) {
        let grace = manifest.stop.as_ref().and_then(|stop| stop.grace.as_ref()).and_then(from_proto);
        if let (Some(timeout), Some(grace)) = (timeout, grace)
            && timeout >= grace
        {
            let (timeout, grace) = (format_duration(timeout), format_duration(grace));
            let why = format!(
                "{timeout} is not less than stop.grace, {grace}, which it is part of: no time would be left to obey \
                 the stop signal"
            );
            self.at(keys, why);
        }
    }
}
