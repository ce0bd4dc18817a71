//! As whom a service runs. When the agent is root: as the user that the manifest names, else as a uid of the
//! service's own that the hub allotted. Otherwise as the agent itself, since it cannot choose.

use std::ffi::CString;

use nix::unistd::{Gid, Uid, User, geteuid, getgrouplist};

/// A process's user, as the keeper's orders want it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct RunAs {
    /// `None`: the agent's own.
    pub(crate) ids: Option<(u32, u32)>,
    pub(crate) groups: Vec<u32>,
    /// For USER and LOGNAME; empty: the user has no name.
    pub(crate) name: String,
}

/// Asks the system's user database, so it may block. The error is for people.
pub(crate) fn resolve(user: &str, uid: u32) -> Result<RunAs, String> {
    let root = geteuid().is_root();
    match (user, uid) {
        ("", 0) => Ok(RunAs::default()),
        ("", _) if !root => Ok(RunAs::default()),
        // The group has the number of the user, as with user private groups; neither is in /etc/passwd.
        ("", uid) => Ok(RunAs { ids: Some((uid, uid)), groups: Vec::new(), name: String::new() }),
        (name, _) => named(name, root),
    }
}

fn named(name: &str, root: bool) -> Result<RunAs, String> {
    let found = User::from_name(name).map_err(|e| format!("user {name:?} cannot be looked up: {e}"))?;
    let found = found.ok_or_else(|| {
        format!(
            "user {name:?} does not exist on this host; create it there, or leave `user` out of the manifest"
        )
    })?;
    if !root {
        if found.uid == geteuid() {
            return Ok(RunAs { name: name.to_owned(), ..RunAs::default() });
        }
        let own = User::from_uid(geteuid()).ok().flatten().map_or_else(|| geteuid().to_string(), |u| u.name);
        return Err(format!(
            "user {name:?}: the agent on this host runs as {own} and so can start services only as {own}; run it as root, or leave `user` out of the manifest"
        ));
    }
    Ok(RunAs {
        ids: Some((found.uid.as_raw(), found.gid.as_raw())),
        groups: groups(name, found.gid),
        name: found.name,
    })
}

/// Supplementary groups; without them when the database does not answer.
fn groups(name: &str, gid: Gid) -> Vec<u32> {
    let Ok(name) = CString::new(name) else { return Vec::new() };
    let groups = getgrouplist(&name, gid).unwrap_or_default();
    groups.into_iter().map(Gid::as_raw).collect()
}

/// Whether `path` and all above it may be passed through by other users; the first that may not otherwise.
pub(crate) fn closed_to_others(path: &std::path::Path) -> Option<&std::path::Path> {
    use std::os::unix::fs::MetadataExt as _;
    path.ancestors().find(|dir| std::fs::metadata(dir).is_ok_and(|data| data.mode() & 0o001 == 0))
}

/// The agent's own user id, for directories of services without one.
pub(crate) fn own_uid() -> Uid {
    geteuid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allotted_uid_is_used_only_by_root() {
        let run_as = resolve("", 30_001).unwrap();
        let expected = own_uid().is_root().then_some((30_001, 30_001));
        assert_eq!(run_as.ids, expected);
        assert_eq!(resolve("", 0).unwrap(), RunAs::default());
    }

    #[test]
    fn an_unknown_user_is_refused_by_name() {
        let said = resolve("no-such-user", 30_001).unwrap_err();
        assert!(said.starts_with("user \"no-such-user\" does not exist on this host"), "{said}");
    }

    #[test]
    fn a_named_user_is_looked_up_or_refused_with_the_reason() {
        match (own_uid().is_root(), resolve("nobody", 30_001)) {
            (true, run_as) => assert!(run_as.unwrap().ids.is_some_and(|(uid, _)| uid > 0)),
            (false, refused) => assert!(refused.unwrap_err().contains("run it as root")),
        }
    }
}
