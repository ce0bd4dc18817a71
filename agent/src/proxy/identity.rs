//! Who calls. The kernel says whose socket is at the other end of a connection on this host: the cgroup that it was
//! made in names the service, whatever the caller claims. A process that is none of ours counts as its user on this
//! host. Where there is no cgroup2, the service is told by its user, which every service has to itself under root.
//!
//! A socket keeps the cgroup of the process that made it. One that was handed to another service's process (by
//! SCM_RIGHTS) speaks for its maker.

mod groups;
mod sock_diag;

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tracing::warn;

use super::route::Caller;
use groups::Groups;
use sock_diag::{Owner, SockDiag};

/// Names callers for as long as the agent runs.
#[derive(Debug)]
pub(crate) struct Attestor {
    /// This host's name.
    host: Arc<str>,
    diag: Option<SockDiag>,
    groups: Option<Groups>,
    /// Services by their uid.
    users: ArcSwap<BTreeMap<u32, Arc<str>>>,
}

impl Attestor {
    /// `groups`: the directories of all our cgroups in the cgroup2 hierarchy, if there are any.
    pub(crate) fn new(host: &str, groups: Vec<PathBuf>) -> Self {
        let diag = SockDiag::open().inspect_err(|error| {
            warn!(%error, "the kernel does not say who calls: callers on this host count as unknown");
        });
        Self {
            host: host.into(),
            diag: diag.ok(),
            groups: (!groups.is_empty()).then(|| Groups::new(groups)),
            users: ArcSwap::default(),
        }
    }

    /// Which services have a uid of their own on this host.
    pub(crate) fn set_users(&self, users: BTreeMap<u32, Arc<str>>) {
        self.users.store(Arc::new(users));
    }

    /// Who opened a connection that was accepted here. `local` is our end of it.
    pub(crate) fn caller(&self, peer: SocketAddr, local: SocketAddr) -> Caller {
        let (SocketAddr::V4(peer), SocketAddr::V4(local)) = (peer, local) else { return Caller::Unknown };
        match self.owner(peer, local) {
            Ok(owner) => self.name(owner),
            // It has gone already, or the kernel does not say.
            Err(_) => Caller::Unknown,
        }
    }

    fn owner(&self, peer: SocketAddrV4, local: SocketAddrV4) -> io::Result<Owner> {
        let diag = self.diag.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        diag.owner(peer, local)
    }

    fn name(&self, owner: Owner) -> Caller {
        let service = match (owner.cgroup, &self.groups) {
            (Some(cgroup), Some(groups)) => groups.service(cgroup),
            (None, _) | (_, None) => self.users.load().get(&owner.uid).cloned(),
        };
        match service {
            Some(service) => Caller::Service(service),
            None => Caller::User { host: self.host.clone(), uid: owner.uid },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A connection to ourselves: the caller's end, and the two addresses as the accepting end sees them.
    fn connection() -> (TcpStream, TcpStream, SocketAddr, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, peer) = listener.accept().unwrap();
        let local = far.local_addr().unwrap();
        (near, far, peer, local)
    }

    #[test]
    fn a_process_outside_is_its_user_on_this_host() {
        let attestor = Attestor::new("box", vec![tempfile::tempdir().unwrap().path().to_owned()]);
        let (_near, _far, peer, local) = connection();
        let uid = nix::unistd::geteuid().as_raw();
        assert_eq!(attestor.caller(peer, local).to_string(), format!("host/box/uid/{uid}"));
    }

    #[test]
    fn without_cgroup2_a_services_user_names_it() {
        let attestor = Attestor::new("box", Vec::new());
        attestor.set_users([(nix::unistd::geteuid().as_raw(), "web".into())].into());
        let (_near, _far, peer, local) = connection();
        assert_eq!(attestor.caller(peer, local), Caller::Service("web".into()));
    }

    /// With a cgroup of its own, as on real hosts; said and skipped where none can be made.
    #[test]
    fn a_process_in_a_services_cgroup_is_that_service() {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let place = fields.nth(1)?;
            (fields.next() == Some("cgroup2")).then(|| PathBuf::from(place))
        });
        let folder = mount.map(|mount| mount.join(format!("nave-test-attestor-{}", std::process::id())));
        let group = folder.as_ref().map(|folder| folder.join("web/i-1-1"));
        let Some((folder, group)) =
            folder.zip(group).filter(|(_, group)| std::fs::create_dir_all(group).is_ok())
        else {
            return warn!("skipped: no cgroup can be made here");
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        // A child that moves itself before it connects, and holds the connection until it is told.
        let script = format!(
            "echo $$ > {}/cgroup.procs && exec 3<>/dev/tcp/{}/{} && read -r _",
            group.display(),
            to.ip(),
            to.port()
        );
        let mut child = std::process::Command::new("bash")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (accepted, peer) = listener.accept().unwrap();
        let caller = Attestor::new("box", vec![folder.clone()]).caller(peer, accepted.local_addr().unwrap());
        drop(child.stdin.take());
        child.wait().unwrap();
        for directory in [group.as_path(), group.parent().unwrap(), &folder] {
            std::fs::remove_dir(directory).unwrap();
        }
        assert_eq!(caller, Caller::Service("web".into()));
    }
}
