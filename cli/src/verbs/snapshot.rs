//! `nave cluster snapshot` and `restore`: the registry as a file, and back. The file takes its name only when it is
//! whole, checked and on disk; a restore works on the folder of a stopped member and asks no hub.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nave_orchestrator::{MemberConfig, Restored, SnapshotInfo, check_snapshot};
use nave_proto::pb;
use tonic::Streaming;

use crate::args::{Restore, TakeSnapshot};
use crate::client::Hub;
use crate::context::plain;
use crate::failure::Failure;
use crate::{out, roles, when};

pub(super) async fn take(args: &TakeSnapshot, hub: &Hub) -> Result<(), Failure> {
    let parts = hub
        .read(|mut member| async move { member.cluster.take_snapshot(pb::TakeSnapshotRequest {}).await })
        .await?;
    let mut name = args.file.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = Partial(args.file.with_file_name(name));
    receive(parts, &partial.0).await?;
    let info = check_snapshot(&partial.0).map_err(anyhow::Error::from)?;
    std::fs::rename(&partial.0, &args.file)
        .and_then(|()| sync_folder(&args.file))
        .map_err(|error| cannot_write(&args.file, &error))?;
    out::line(format_args!("{}  {}", args.file.display(), words(&info)));
    Ok(())
}

/// Deleted when the file did not come to its end.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

async fn receive(mut parts: Streaming<pb::SnapshotPart>, path: &Path) -> Result<(), Failure> {
    let mut file = File::create(path).map_err(|error| cannot_write(path, &error))?;
    while let Some(part) = parts.message().await.map_err(|status| Failure::from_status(&status))? {
        file.write_all(&part.data).map_err(|error| cannot_write(path, &error))?;
    }
    file.sync_all().map_err(|error| cannot_write(path, &error))
}

fn sync_folder(file: &Path) -> std::io::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::refused(format!("cannot write {}: {}", path.display(), plain(error)))
}

/// `nave cluster snapshot FILE --verify`, `restore FILE --check`: reads the file and nothing else.
pub(crate) fn verify(file: &Path) -> Result<(), Failure> {
    let info = check_snapshot(file).map_err(anyhow::Error::from)?;
    out::line(format_args!("{} is whole: {}", file.display(), words(&info)));
    Ok(())
}

/// `nave cluster restore`.
pub(crate) fn restore(args: &Restore) -> Result<(), Failure> {
    if args.check {
        return verify(&args.file);
    }
    let config = args.config.as_deref().context("clap asks for --config")?;
    let config_file = config;
    let config = MemberConfig::load(config).map_err(anyhow::Error::from)?;
    let restored = roles::runtime()?
        .block_on(nave_orchestrator::restore(&config, &args.file, args.other_cluster))
        .map_err(anyhow::Error::from)?;
    say(&config, config_file, &restored);
    Ok(())
}

fn say(config: &MemberConfig, config_file: &Path, restored: &Restored) {
    out::line(format_args!(
        "{} ({}) holds {} now, as incarnation {}, from revision {} on",
        config.id,
        config.name,
        words(&restored.snapshot),
        restored.incarnation,
        restored.revision
    ));
    if let Some(aside) = &restored.set_aside {
        out::line(format_args!("what it held before is in {}", aside.display()));
    }
    out::line(format_args!(
        "\nstart it; it leads alone:\n  nave orchestrator --config {}",
        config_file.display()
    ));
    let others: Vec<_> = config.members.iter().filter(|member| member.id != config.id).collect();
    if !others.is_empty() {
        out::line(
            "\nthen add the others anew. Never start them on what they hold: it is another history, and two hubs would \
             rule the same hosts",
        );
        for other in others {
            out::line(format_args!("  nave cluster add {}", other.address));
        }
    }
    if restored.other_cluster {
        out::line(
            "\nthe file is of another cluster: services and their history went over; its hosts have to join, and nothing runs yet",
        );
    }
}

fn words(info: &SnapshotInfo) -> String {
    let when = jiff::Timestamp::from_nanosecond(i128::from(info.created_unix_ns)).ok();
    format!(
        "{} services, {} instances and {} hosts of cluster {} at revision {} (incarnation {}), {} KiB, written {} by nave {}",
        info.services,
        info.instances,
        info.hosts,
        info.cluster_id,
        info.revision,
        info.incarnation,
        info.size_bytes.div_ceil(1024),
        when::rfc3339(when),
        info.written_by
    )
}
