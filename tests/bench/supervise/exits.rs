//! From the end of a process to the first moment of its successor, by what both wrote themselves: 200 instances that
//! end five times each, after ten good seconds and a little, under Nave and under what else there is.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nave_tests::nave::target_dir;
use nave_tests::wait::pause;
use tokio::time::Instant;

use super::rivals::RIVALS;
use super::{ms, one_host, percentiles};

pub(super) const INSTANCES: usize = 200;
/// Of each; the instance's own number.
const ENDS: usize = 5;
/// Five lives of at most 14 s, and a slow start.
const LIMIT: Duration = Duration::from_secs(240);

pub(crate) fn run() -> anyhow::Result<()> {
    println!("| under | ends | p50 ms | p99 ms | max ms |\n|---|---|---|---|---|");
    print("Nave", &nave()?);
    for rival in RIVALS {
        match rival.measure()? {
            Some(gaps) => print(rival.name, &gaps),
            None => println!("| {} | not installed | | | |", rival.name),
        }
    }
    Ok(())
}

fn print(name: &str, gaps: &[Duration]) {
    let (middle, high, max) = percentiles(gaps.to_vec());
    println!("| {name} | {} | {} | {} | {} |", gaps.len(), ms(middle), ms(high), ms(max));
}

fn nave() -> anyhow::Result<Vec<Duration>> {
    let notes = Notes::new()?;
    let cluster = one_host();
    let manifest = format!(
        "name = \"instance\"\ncommand = [\"{}\", \"{}\"]\ncount = {INSTANCES}\n",
        program().display(),
        notes.dir().display()
    );
    cluster.apply(&manifest, &[]).expect(0);
    notes.gaps()
}

pub(super) fn program() -> PathBuf {
    target_dir().join("nave-bench-instance")
}

/// Where the instances write, each in a file of its own.
pub(super) struct Notes(tempfile::TempDir);

impl Notes {
    /// Services have users of their own.
    pub(super) fn new() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777))?;
        Ok(Self(dir))
    }

    pub(super) fn dir(&self) -> &Path {
        self.0.path()
    }

    /// Waits until every instance has begun its last life; from each end to the start after it.
    pub(super) fn gaps(&self) -> anyhow::Result<Vec<Duration>> {
        let began = Instant::now();
        loop {
            let all = self.read()?;
            let gaps: Vec<Duration> = all.into_iter().flatten().collect();
            if gaps.len() >= INSTANCES * ENDS {
                return Ok(gaps);
            }
            anyhow::ensure!(began.elapsed() < LIMIT, "only {} ends after {LIMIT:?}", gaps.len());
            pause(Duration::from_millis(500));
        }
    }

    fn read(&self) -> anyhow::Result<Vec<Vec<Duration>>> {
        std::fs::read_dir(self.dir())?
            .map(|entry| {
                let text = std::fs::read_to_string(entry?.path())?;
                let mut ended = None;
                let mut gaps = Vec::new();
                for line in text.lines() {
                    let (what, at) = line.split_once(' ').context("a line of an instance")?;
                    let at: u64 = at.parse()?;
                    match what {
                        "end" => ended = Some(at),
                        _ => {
                            gaps.extend(ended.take().map(|end| Duration::from_nanos(at.saturating_sub(end))))
                        }
                    }
                }
                Ok(gaps)
            })
            .collect()
    }
}
