//! The `/etc/resolv.conf` that supervised processes see: the agent's server first, then the host's own, so that the agent
//! is never a single point for all names. Written beside the agent's data and mounted over theirs by the exec-stub.

use std::fs::{OpenOptions, Permissions};
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

/// What the host has.
const HOSTS_OWN: &str = "/etc/resolv.conf";
/// A host that gets other servers tells its processes within this time.
const LOOK: Duration = Duration::from_secs(10);
/// glibc and musl look at no more.
const SERVERS_MAX: usize = 3;

/// The file, once it is written.
#[derive(Debug, Clone)]
pub(crate) struct ResolvConf {
    path: PathBuf,
    server: Ipv4Addr,
}

impl ResolvConf {
    /// Writes it. Blocks.
    ///
    /// # Errors
    /// The host has none to begin with, or the disk refuses.
    pub(crate) fn write(path: PathBuf, server: Ipv4Addr) -> std::io::Result<Self> {
        let written = Self { path, server };
        written.refresh()?;
        Ok(written)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Follows the host's file until `shutdown`.
    pub(crate) async fn follow(self, shutdown: CancellationToken) {
        let mut failing = false;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let this = self.clone();
            let refreshed = tokio::task::spawn_blocking(move || this.refresh()).await;
            if let Ok(Err(error)) = &refreshed
                && !failing
            {
                warn!(%error, "services are not told of the host's name servers");
            }
            failing = !matches!(refreshed, Ok(Ok(())));
        }
    }

    /// In place, since processes have this very file mounted.
    fn refresh(&self) -> std::io::Result<()> {
        let text = merged(&std::fs::read_to_string(HOSTS_OWN)?, self.server);
        if std::fs::read_to_string(&self.path).is_ok_and(|before| before == text) {
            return Ok(());
        }
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(&self.path)?;
        file.set_permissions(Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())?;
        file.set_len(text.len() as u64)
    }
}

/// The host's file with another first server, which answers or refuses at once, and little patience with each.
fn merged(host: &str, server: Ipv4Addr) -> String {
    let own = server.to_string();
    let lines = || host.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    let servers = lines()
        .filter_map(|line| line.strip_prefix("nameserver"))
        .map(str::trim)
        .filter(|address| !address.is_empty() && *address != own);
    let mut text = format!("# written by nave\nnameserver {own}\n");
    for address in servers.take(SERVERS_MAX - 1) {
        text.push_str(&format!("nameserver {address}\n"));
    }
    for line in lines().filter(|line| {
        line.starts_with("search") || line.starts_with("domain") || line.starts_with("sortlist")
    }) {
        text.push_str(line);
        text.push('\n');
    }
    let kept = lines()
        .filter_map(|line| line.strip_prefix("options"))
        .flat_map(str::split_whitespace)
        // Asked of all servers in turn, the first would not know the names of others.
        .filter(|option| {
            !option.starts_with("timeout:") && !option.starts_with("attempts:") && *option != "rotate"
        });
    let options: Vec<&str> = kept.chain(["timeout:1", "attempts:2"]).collect();
    text.push_str(&format!("options {}\n", options.join(" ")));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: Ipv4Addr = Ipv4Addr::new(127, 88, 0, 1);

    #[test]
    fn the_hosts_own_servers_stay_behind_the_agents() {
        let host = "# by hand\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n\
                    search example.org\noptions ndots:2 timeout:5 rotate\n";
        let expected = "# written by nave\nnameserver 127.88.0.1\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n\
                        search example.org\noptions ndots:2 timeout:1 attempts:2\n";
        assert_eq!(merged(host, SERVER), expected);
        assert_eq!(merged(expected, SERVER), expected, "it never names itself twice");
        assert_eq!(
            merged("", SERVER),
            "# written by nave\nnameserver 127.88.0.1\noptions timeout:1 attempts:2\n"
        );
    }
}
