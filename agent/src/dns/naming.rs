//! Names of services as this host answers them: the server, once its port can be had, and the resolver's file that
//! services see. Where another program has the port, it is tried again for as long as the agent runs, as the proxy's
//! addresses are, and `nave hosts` says so meanwhile.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use tracing::{info, warn};

use super::resolv::ResolvConf;
use super::{DnsServer, PORT, address};
use crate::directory::Ways;
use crate::executor::ports::holder_or_other;
use crate::executor::users;
use crate::notes::Notes;
use crate::sockets::Sockets;

/// What it is about, among the host's notes.
const ABOUT: &str = "dns";

/// The file that services get as their `/etc/resolv.conf`, once names are answered. A process that began before has the
/// host's own until it is started again.
pub(crate) type Resolver = Arc<OnceLock<PathBuf>>;

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Naming {
    prefix: [u8; 2],
    at: SocketAddr,
    ways: Ways,
    /// Where the resolver's file is to be.
    file: PathBuf,
    notes: Notes,
    resolver: Resolver,
    begun: bool,
    /// Why not, as it was last said.
    lack: Option<std::io::ErrorKind>,
}

/// What answers, to be run.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) server: DnsServer,
    pub(crate) resolv_conf: Option<ResolvConf>,
}

impl Naming {
    pub(crate) fn new(prefix: [u8; 2], ways: Ways, file: PathBuf, notes: Notes) -> Self {
        let at = SocketAddr::from((address(prefix), PORT));
        let (resolver, begun, lack) = Default::default();
        Self { prefix, at, ways, file, notes, resolver, begun, lack }
    }

    pub(crate) fn resolver(&self) -> Resolver {
        Arc::clone(&self.resolver)
    }

    /// There is nothing left to try.
    pub(crate) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Takes the port, if it can be had now.
    pub(crate) async fn begin(&mut self, sockets: &mut Sockets) -> Option<Begun> {
        let server = match DnsServer::bind_at(self.at, sockets, self.prefix, self.ways.clone()) {
            Ok(server) => server,
            Err(error) => {
                self.complain(&error);
                return None;
            }
        };
        (self.begun, self.lack) = (true, None);
        self.notes.unsay(ABOUT);
        info!(address = %self.at, "names of services are answered");
        let resolv_conf = if users::own_uid().is_root() { self.write().await } else { None };
        Some(Begun { server, resolv_conf })
    }

    /// Once for each reason: to look for who has the port costs a walk through all processes.
    fn complain(&mut self, error: &std::io::Error) {
        if self.lack.replace(error.kind()) == Some(error.kind()) {
            return;
        }
        let port = self.at.port();
        let why = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                let holder = holder_or_other(port);
                format!("{holder} has port {port}; it is taken once it is free")
            }
            std::io::ErrorKind::PermissionDenied => format!("this agent may not listen on port {port}"),
            _ => error.to_string(),
        };
        let address = self.at.ip();
        let sentence = format!("names such as web.nave.internal are not answered at {address}: {why}");
        warn!(address = %self.at, %error, "{sentence}");
        self.notes.say(ABOUT, sentence);
    }

    async fn write(&mut self) -> Option<ResolvConf> {
        let (file, address) = (self.file.clone(), address(self.prefix));
        let written = tokio::task::spawn_blocking(move || ResolvConf::write(file, address)).await;
        match written.map_err(std::io::Error::other).flatten() {
            Ok(resolv_conf) => {
                self.resolver.get_or_init(|| resolv_conf.path().to_owned());
                Some(resolv_conf)
            }
            Err(error) => {
                let sentence = "services keep the host's resolver, which knows no names of services";
                self.notes.say("resolver", format!("{sentence}: {error}"));
                warn!(%error, "{sentence}");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nave_agent_core::directory::Directory;
    use nave_proto::ids::HostId;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::directory::{Asks, DirectoryHandle};
    use crate::proxy::{Proxy, ProxyConfig, Routes};

    /// On any port, since 53 is not everybody's.
    fn naming(at: SocketAddr, dir: &std::path::Path, notes: &Notes, stop: &CancellationToken) -> Naming {
        let directory = DirectoryHandle::new(Directory::default(), Asks::default());
        let config = ProxyConfig {
            prefix: [127, 88],
            own_host: HostId(1),
            workers: 1,
            ports_file: dir.join("ports"),
            singles_file: dir.join("singles"),
            routes: Routes::default(),
            records: Arc::default(),
            notes: Notes::default(),
            credentials: None,
            attest: ("box".to_owned(), Vec::new()),
        };
        let ways = Ways::new(directory, Proxy::start(config, stop.clone()).unwrap());
        let naming = Naming::new([127, 88], ways, dir.join("resolv.conf"), notes.clone());
        Naming { at, ..naming }
    }

    #[tokio::test]
    async fn a_port_that_was_taken_is_had_once_it_is_free() {
        let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let at = taken.local_addr().unwrap();
        let (dir, notes, stop) = (tempfile::tempdir().unwrap(), Notes::default(), CancellationToken::new());
        let mut sockets = Sockets::default();
        let mut naming = naming(at, dir.path(), &notes, &stop);
        assert!(naming.begin(&mut sockets).await.is_none() && !naming.has_begun());
        let said = notes.news().unwrap();
        let own = format!("process {} (", std::process::id());
        assert!(said[0].contains(&own) && said[0].contains(&format!("has port {}", at.port())), "{said:?}");
        assert!(naming.begin(&mut sockets).await.is_none());
        assert_eq!(notes.news(), None, "said once");
        assert_eq!(naming.resolver().get(), None);

        drop(taken);
        let begun = naming.begin(&mut sockets).await.unwrap();
        assert_eq!(notes.news().unwrap(), [""; 0]);
        assert!(naming.has_begun());
        if users::own_uid().is_root() {
            assert_eq!(naming.resolver().get(), Some(&dir.path().join("resolv.conf")));
        }
        let (ends, asking) = (stop.clone(), tokio::net::UdpSocket::bind(("127.0.0.1", 0)).await.unwrap());
        let mut serving = tokio::task::JoinSet::new();
        serving.spawn(begun.server.serve(ends));
        // A question of no service at all is refused, which is an answer.
        let question = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07example\0\0\x01\0\x01";
        asking.send_to(question, at).await.unwrap();
        let mut answer = [0; 512];
        let answered = tokio::time::timeout(std::time::Duration::from_secs(10), asking.recv(&mut answer));
        assert!(answered.await.unwrap().unwrap() > 2 && answer.starts_with(b"\x12\x34"));
        stop.cancel();
        serving.join_next().await.unwrap().unwrap();
    }
}
