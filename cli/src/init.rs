//! Makes a new cluster out of nothing: its CA, a folder for each member, the operator's client file and a first join
//! token. `nave init` is the person's door, `nave dev` uses [`create`] for its own. Nothing is changed afterwards:
//! a second cluster gets a second directory.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nave_orchestrator::{Bootstrap, LogConfig, MemberConfig, MemberEntry, SnapshotConfig};
use nave_proto::ids::{ClusterId, MemberId};
use nave_proto::token::JoinToken;
use nave_tls::{Authority, OPERATOR_VALIDITY, Role};
use rand::Rng as _;

use crate::args::{Init, MEMBER_PORT};
use crate::context::{ClientFile, is_address, plain};
use crate::failure::Failure;
use crate::{clock, out};

/// A member that is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewMember {
    pub(crate) name: String,
    /// As everyone dials it.
    pub(crate) address: String,
    pub(crate) listen: SocketAddr,
    pub(crate) metrics_listen: SocketAddr,
    /// Gets `member.toml` and the CA.
    pub(crate) folder: PathBuf,
}

/// All that [`create`] needs to know.
#[derive(Debug, Clone)]
pub(crate) struct NewCluster {
    pub(crate) dir: PathBuf,
    pub(crate) members: Vec<NewMember>,
    /// Name of the first operator.
    pub(crate) operator: String,
    pub(crate) token_ttl: Duration,
}

impl NewCluster {
    pub(crate) fn client_file(&self) -> PathBuf {
        self.dir.join("client.toml")
    }

    pub(crate) fn token_file(&self) -> PathBuf {
        self.dir.join("join-token")
    }
}

pub(crate) fn run(args: &Init) -> Result<(), Failure> {
    let addresses =
        args.members.iter().map(|text| address("--members", text)).collect::<Result<Vec<_>, _>>()?;
    refuse_wrong(&addresses)?;
    refuse_occupied(&args.out)?;
    let cluster = NewCluster {
        dir: args.out.clone(),
        members: addresses
            .iter()
            .enumerate()
            .map(|(index, address)| member(index + 1, address, &args.out))
            .collect(),
        operator: operator_name(),
        token_ttl: args.token_ttl,
    };
    create(&cluster)?;
    print_next(&cluster);
    Ok(())
}

/// Writes everything; the directory may exist and be empty.
pub(crate) fn create(cluster: &NewCluster) -> Result<(), Failure> {
    let id = ClusterId(rand::rng().random());
    let authority = Authority::generate(id);
    let now = clock::now_unix();
    let token = JoinToken::new(id, authority.sha256(), rand::rng().random());
    let bootstrap = Bootstrap {
        token_id: token.id.clone(),
        token_sha256: Bootstrap::hex(&token.secret_sha256()),
        token_expires_unix: now
            .saturating_add(i64::try_from(cluster.token_ttl.as_secs()).unwrap_or(i64::MAX)),
    };
    folder(&cluster.dir)?;
    for (index, member) in cluster.members.iter().enumerate() {
        folder(&member.folder)?;
        authority.save(&member.folder).context("write the cluster's CA")?;
        let config = member_config(cluster, index, id, &bootstrap);
        let text = toml::to_string(&config).context("write member.toml as TOML")?;
        write(
            &member.folder.join("member.toml"),
            0o644,
            &format!("# One hub member: nave orchestrator --config FILE\n{text}"),
        )?;
    }
    write(&cluster.token_file(), 0o600, &format!("{token}\n"))?;
    let operator = authority
        .issue_new(Role::Operator(cluster.operator.clone()), OPERATOR_VALIDITY, now)
        .context("issue the operator's certificate")?;
    let [ca, certificate, key] = ["ca.pem", "operator.pem", "operator.key"];
    let in_dir = |name: &str| cluster.dir.join(name);
    operator
        .save(&in_dir(certificate), &in_dir(key), &in_dir(ca))
        .context("write the operator's certificate")?;
    let client = ClientFile {
        addresses: cluster.members.iter().map(|member| member.address.clone()).collect(),
        ca: ca.to_owned(),
        certificate: certificate.to_owned(),
        key: key.to_owned(),
    };
    let text = toml::to_string(&client).context("write client.toml as TOML")?;
    // Last: who finds it finds a whole cluster.
    write(
        &cluster.client_file(),
        0o644,
        &format!("# An operator's way to the cluster: export NAVE_CONTEXT=FILE\n{text}"),
    )
}

fn member_config(cluster: &NewCluster, index: usize, id: ClusterId, bootstrap: &Bootstrap) -> MemberConfig {
    let member = &cluster.members[index];
    let entries = cluster.members.iter().enumerate().map(|(index, member)| MemberEntry {
        id: member_id(index),
        name: member.name.clone(),
        address: member.address.clone(),
    });
    MemberConfig {
        id: member_id(index),
        name: member.name.clone(),
        cluster_id: id,
        data_dir: "data".into(),
        listen: member.listen,
        advertise: member.address.clone(),
        metrics_listen: Some(member.metrics_listen),
        ca_cert: "ca.pem".into(),
        ca_key: "ca.key".into(),
        snapshots: SnapshotConfig::default(),
        log: LogConfig::default(),
        join: false,
        members: entries.collect(),
        bootstrap: Some(bootstrap.clone()),
    }
}

fn member_id(index: usize) -> MemberId {
    MemberId(index as u64 + 1)
}

/// `host`, `host:port`, `[::1]:port`.
pub(crate) fn address(flag: &str, text: &str) -> Result<String, Failure> {
    let text = text.trim();
    if is_address(text) {
        return Ok(text.to_owned());
    }
    let with_port = match text.parse::<IpAddr>() {
        Ok(IpAddr::V6(ip)) => format!("[{ip}]:{MEMBER_PORT}"),
        _ => format!("{text}:{MEMBER_PORT}"),
    };
    if is_address(&with_port) {
        return Ok(with_port);
    }
    Err(Failure::usage(format!("{flag}: {text:?} is neither a host nor host:port")))
}

fn refuse_wrong(addresses: &[String]) -> Result<(), Failure> {
    const MEMBERS_MAX: usize = 7;
    if addresses.len() > MEMBERS_MAX {
        return Err(Failure::usage(format!(
            "--members: {} are too many, a hub has at most 7",
            addresses.len()
        )));
    }
    for (index, address) in addresses.iter().enumerate() {
        if addresses[..index].contains(address) {
            return Err(Failure::usage(format!("--members: {address} is given twice")));
        }
        if address.starts_with("0.0.0.0:") || address.starts_with("[::]:") {
            return Err(Failure::usage(format!(
                "--members: {address} is not an address that others can dial"
            )));
        }
    }
    if addresses.len().is_multiple_of(2) {
        out::note(format_args!(
            "{} members survive the loss of {}, no more than {} do; an odd number is usual",
            addresses.len(),
            (addresses.len() - 1) / 2,
            addresses.len() - 1
        ));
    }
    Ok(())
}

fn refuse_occupied(dir: &Path) -> Result<(), Failure> {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Failure::refused(format!("{} is not empty", dir.display()))
                .next("choose another --out; keys that are in use are never overwritten")),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::refused(format!("cannot use {}: {}", dir.display(), plain(&error)))),
    }
}

/// Listens on every interface, or on the loopback alone when that is how it is dialled; then the port of `/metrics`.
pub(crate) fn listening(address: &str) -> (SocketAddr, SocketAddr) {
    let (host, port) = address.rsplit_once(':').expect("address() gives host:port");
    let port: u16 = port.parse().expect("address() gives a port");
    let any: IpAddr = match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(ip) if ip.is_loopback() => ip,
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    // 7400 and 7480, and the same distance for members that share a machine.
    let metrics = port.checked_add(80).unwrap_or_else(|| port - 80);
    (SocketAddr::new(any, port), SocketAddr::new(Ipv4Addr::LOCALHOST.into(), metrics))
}

fn member(number: usize, address: &str, dir: &Path) -> NewMember {
    let (listen, metrics_listen) = listening(address);
    NewMember {
        name: format!("member-{number}"),
        address: address.to_owned(),
        listen,
        metrics_listen,
        folder: dir.join(format!("member-{number}")),
    }
}

/// The person's own name, as the cluster's history will show it.
pub(crate) fn operator_name() -> String {
    let name = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|variable| std::env::var(variable).ok());
    let name: String = name
        .unwrap_or_default()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(32)
        .collect();
    if name.is_empty() { "admin".to_owned() } else { name.to_lowercase() }
}

fn print_next(cluster: &NewCluster) {
    let shown = cluster.dir.display();
    out::line(format_args!("made a cluster of {} in {shown}", cluster.members.len()));
    out::line(
        "\non each member's machine, with its own folder copied there (it holds the CA's key: keep it private):",
    );
    for member in &cluster.members {
        out::line(format_args!(
            "  {:<24} nave orchestrator --config {}/member.toml",
            member.address,
            member.folder.display()
        ));
    }
    let addresses: Vec<_> = cluster.members.iter().map(|member| member.address.as_str()).collect();
    out::line("\non each host that shall run services, with the token copied there:");
    out::line(format_args!(
        "  nave agent --join {} --token-file {} --data-dir /var/lib/nave",
        addresses.join(","),
        cluster.token_file().display()
    ));
    out::line("\nhere:");
    out::line(format_args!("  export NAVE_CONTEXT={}", absolute(&cluster.client_file()).display()));
    out::line("  nave cluster status");
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

pub(crate) fn folder(path: &Path) -> Result<(), Failure> {
    // The keys inside are 0600 themselves; agents' folders must let services through to their own.
    let made = DirBuilder::new().recursive(true).mode(0o711).create(path);
    made.map_err(|error| Failure::refused(format!("cannot make {}: {}", path.display(), plain(&error))))
}

/// Whole or not at all.
pub(crate) fn write(path: &Path, mode: u32, text: &str) -> Result<(), Failure> {
    let fresh = path.with_extension("new");
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&fresh)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&fresh, path));
    written.map_err(|error| Failure::refused(format!("cannot write {}: {}", path.display(), plain(&error))))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::context::Context;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn made() -> (tempfile::TempDir, NewCluster) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("cluster");
        let members = ["10.0.0.1:7400", "10.0.0.2:7400", "10.0.0.3:7400"];
        let cluster = NewCluster {
            members: members
                .iter()
                .enumerate()
                .map(|(index, address)| member(index + 1, address, &dir))
                .collect(),
            dir,
            operator: "me".into(),
            token_ttl: Duration::from_secs(3600),
        };
        create(&cluster).unwrap();
        (folder, cluster)
    }

    #[test]
    fn secrets_are_their_owners_alone() {
        let (_folder, cluster) = made();
        assert_eq!(mode(&cluster.dir.join("operator.key")), 0o600);
        assert_eq!(mode(&cluster.token_file()), 0o600);
        for member in &cluster.members {
            assert_eq!(mode(&member.folder.join("ca.key")), 0o600);
        }
    }

    #[test]
    fn every_member_loads_its_file_and_agrees_with_the_others() {
        let (_folder, cluster) = made();
        let configs: Vec<_> = cluster
            .members
            .iter()
            .map(|member| MemberConfig::load(&member.folder.join("member.toml")).unwrap())
            .collect();
        assert_eq!(configs[1].id, MemberId(2));
        assert_eq!(configs[1].advertise, "10.0.0.2:7400");
        assert!(configs.iter().all(|config| config.members == configs[0].members));
        assert!(configs.iter().all(|config| config.cluster_id == configs[0].cluster_id));
        let token: JoinToken = std::fs::read_to_string(cluster.token_file()).unwrap().parse().unwrap();
        assert_eq!(configs[0].bootstrap.as_ref().unwrap().secret_sha256(), Some(token.secret_sha256()));
    }

    #[test]
    fn the_client_file_speaks_for_an_operator_of_the_cluster() {
        let (_folder, cluster) = made();
        let context = Context::load(Some(&cluster.client_file())).unwrap();
        let credentials = crate::tls::operator(&context).unwrap();
        assert_eq!(credentials.role(), &Role::Operator("me".into()));
        assert_eq!(context.addresses.len(), 3);
    }

    #[test]
    fn a_directory_in_use_is_refused() {
        let (_folder, cluster) = made();
        let failure = refuse_occupied(&cluster.dir).unwrap_err();
        assert!(failure.to_string().contains("is not empty"), "{failure}");
    }

    #[test]
    fn addresses_get_the_usual_port() {
        let address = |text| address("--members", text);
        assert_eq!(address("hub1").unwrap(), "hub1:7400");
        assert_eq!(address("10.0.0.1:9").unwrap(), "10.0.0.1:9");
        assert_eq!(address("::1").unwrap(), "[::1]:7400");
        assert_eq!(address("http://hub1").unwrap_err().exit, crate::failure::Exit::Usage);
        assert!(refuse_wrong(&["a:1".into(), "a:1".into()]).is_err_and(|f| f.to_string().contains("twice")));
    }

    #[test]
    fn a_member_listens_everywhere_unless_it_is_dialled_on_the_loopback() {
        let dir = Path::new("d");
        assert_eq!(member(1, "hub1:7400", dir).listen, "0.0.0.0:7400".parse().unwrap());
        assert_eq!(member(1, "127.0.0.1:7400", dir).listen, "127.0.0.1:7400".parse().unwrap());
        assert_eq!(member(1, "hub1:7400", dir).metrics_listen, "127.0.0.1:7480".parse().unwrap());
        assert_eq!(member(1, "hub1:79", dir).metrics_listen, "127.0.0.1:159".parse().unwrap());
        assert_eq!(member(1, "hub1:65500", dir).metrics_listen, "127.0.0.1:65420".parse().unwrap());
    }
}
