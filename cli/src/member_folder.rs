//! The folder of a member that is added to a cluster: its configuration, and the cluster's CA, copied from another
//! member's folder. Nothing that exists is overwritten, so writing it twice is the same as once.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nave_orchestrator::{LogConfig, MemberConfig, MemberEntry, SnapshotConfig};
use nave_proto::ids::{ClusterId, MemberId};
use nave_proto::pb;
use nave_tls::Authority;

use crate::failure::Failure;
use crate::init;

/// What to write.
pub(crate) struct NewFolder<'a> {
    pub(crate) folder: PathBuf,
    /// Holds `ca.pem` and `ca.key`.
    pub(crate) ca: PathBuf,
    pub(crate) member: &'a pb::AddMemberResponse,
}

/// A folder that holds the CA: the one chosen, else the client file's own or one beside it, as `nave init` left them.
pub(crate) fn find_ca(chosen: Option<&Path>, client_file: &Path) -> Result<PathBuf, Failure> {
    let has = |folder: &Path| folder.join("ca.pem").is_file() && folder.join("ca.key").is_file();
    if let Some(folder) = chosen {
        return if has(folder) {
            Ok(folder.to_owned())
        } else {
            Err(Failure::usage(format!("--ca: {} does not hold ca.pem and ca.key", folder.display())))
        };
    }
    let beside = client_file.parent().unwrap_or(Path::new("."));
    let mut folders = vec![beside.to_owned()];
    if let Ok(entries) = std::fs::read_dir(beside) {
        folders.extend(entries.flatten().map(|entry| entry.path()));
    }
    folders.sort();
    folders.into_iter().find(|folder| has(folder)).ok_or_else(|| {
        Failure::refused("the cluster's CA key is not here, and a member needs it")
            .next("run this where a member's folder is and name it with --ca; nothing was changed")
    })
}

/// Writes the folder, or finds it written; returns its `member.toml`.
pub(crate) fn write(new: &NewFolder<'_>) -> Result<PathBuf, Failure> {
    let file = new.folder.join("member.toml");
    let id: MemberId = new.member.id.parse().context("the hub gave an id that is none")?;
    if file.exists() {
        let there = MemberConfig::load(&file).map_err(anyhow::Error::from)?;
        if there.id == id && there.cluster_id.to_string() == new.member.cluster_id {
            return Ok(file);
        }
        return Err(Failure::refused(format!(
            "{} is of {} of cluster {}",
            file.display(),
            there.id,
            there.cluster_id
        ))
        .next("choose another folder with --out"));
    }
    let authority = Authority::load(&new.ca.join("ca.pem"), &new.ca.join("ca.key")).context("read the CA")?;
    let cluster: ClusterId =
        new.member.cluster_id.parse().context("the hub gave a cluster id that is none")?;
    if authority.cluster() != cluster {
        return Err(Failure::refused(format!(
            "{} holds the CA of cluster {}, this is cluster {cluster}",
            new.ca.display(),
            authority.cluster()
        ))
        .next("name a folder of this cluster with --ca"));
    }
    let config = config(new.member, id, cluster)?;
    init::folder(&new.folder)?;
    authority.save(&new.folder).context("write the cluster's CA")?;
    let text = toml::to_string(&config).context("write member.toml as TOML")?;
    init::write(
        &file,
        0o644,
        &format!("# A hub member that joins a cluster: nave orchestrator --config FILE\n{text}"),
    )?;
    Ok(file)
}

fn config(member: &pb::AddMemberResponse, id: MemberId, cluster: ClusterId) -> Result<MemberConfig, Failure> {
    let mut members = Vec::new();
    for other in &member.members {
        // Those that are joining too may never come.
        if other.role != "joining" && other.address != member.address && other.name != member.name {
            let id = other.id.parse().context("the hub gave an id that is none")?;
            members.push(MemberEntry { id, name: other.name.clone(), address: other.address.clone() });
        }
    }
    members.push(MemberEntry { id, name: member.name.clone(), address: member.address.clone() });
    let (listen, metrics_listen) = init::listening(&member.address);
    Ok(MemberConfig {
        id,
        name: member.name.clone(),
        cluster_id: cluster,
        data_dir: "data".into(),
        listen,
        advertise: member.address.clone(),
        metrics_listen: Some(metrics_listen),
        ca_cert: "ca.pem".into(),
        ca_key: "ca.key".into(),
        snapshots: SnapshotConfig::default(),
        log: LogConfig::default(),
        join: true,
        members,
        bootstrap: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(cluster: ClusterId) -> pb::AddMemberResponse {
        let other = pb::Member {
            id: "m-1".into(),
            name: "member-1".into(),
            address: "10.0.0.1:7400".into(),
            role: "leader".into(),
            ..Default::default()
        };
        pb::AddMemberResponse {
            id: "m-4".into(),
            name: "member-4".into(),
            address: "10.0.0.4:7400".into(),
            cluster_id: cluster.to_string(),
            members: vec![other],
            already: false,
        }
    }

    #[test]
    fn the_folder_can_be_started_and_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = ClusterId(7);
        let ca = dir.path().join("member-1");
        std::fs::create_dir(&ca).unwrap();
        Authority::generate(cluster).save(&ca).unwrap();
        let client = dir.path().join("client.toml");
        assert_eq!(find_ca(None, &client).unwrap(), ca);
        let member = response(cluster);
        let new = NewFolder { folder: dir.path().join("member-4"), ca: ca.clone(), member: &member };
        let file = write(&new).unwrap();
        let config = MemberConfig::load(&file).unwrap();
        assert!(config.join && config.bootstrap.is_none());
        assert_eq!((config.id, config.members.len()), (MemberId(4), 2));
        assert_eq!(write(&new).unwrap(), file, "a second time");
        let other = pb::AddMemberResponse { id: "m-5".into(), ..member.clone() };
        let refused = write(&NewFolder { member: &other, ca, folder: new.folder.clone() }).unwrap_err();
        assert!(refused.to_string().contains("m-4"), "{refused}");
    }

    #[test]
    fn a_foreign_ca_or_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let client = dir.path().join("client.toml");
        assert!(find_ca(None, &client).unwrap_err().to_string().contains("CA key is not here"));
        assert!(find_ca(Some(dir.path()), &client).unwrap_err().to_string().contains("--ca"));
        Authority::generate(ClusterId(8)).save(dir.path()).unwrap();
        let new = NewFolder {
            folder: dir.path().join("member-4"),
            ca: dir.path().to_owned(),
            member: &response(ClusterId(7)),
        };
        let refused = write(&new).unwrap_err().to_string();
        assert!(refused.contains("CA of cluster 0000000000000008"), "{refused}");
        assert!(!new.folder.exists());
    }
}
