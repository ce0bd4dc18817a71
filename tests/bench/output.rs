//! A flood of output: 10 processes, 20,000 lines a second each, for half a minute. Every line must be in the files or
//! counted as dropped, no writer held up for long, and keeper and agent must not grow. The writer measures its own
//! calls of write, one for each line; what it measured is the last thing that it prints.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nave_tests::{Cluster, Setup, eventually};
use tokio::time::Instant;

/// The verb of the writing process.
pub(crate) const WRITER: &str = "output-writer";
const WRITERS: usize = 10;
const LINES_PER_SECOND: u128 = 20_000;
const WRITES_FOR: Duration = Duration::from_secs(30);

/// The writing process.
pub(crate) fn write() -> anyhow::Result<()> {
    let mut out = std::io::stderr().lock();
    let pad = "x".repeat(80);
    let (mut line, mut longest, mut over_100_ms) = (Vec::new(), Duration::ZERO, 0);
    let mut written: u128 = 0;
    let began = Instant::now();
    while began.elapsed() < WRITES_FOR {
        let due = began.elapsed().as_millis() * LINES_PER_SECOND / 1000;
        while written < due {
            line.clear();
            writeln!(line, "{written:010} {pad}")?;
            let before = Instant::now();
            out.write_all(&line)?;
            let took = before.elapsed();
            longest = longest.max(took);
            over_100_ms += u32::from(took > Duration::from_millis(100));
            written += 1;
        }
        nave_tests::wait::pause(Duration::from_millis(1));
    }
    // In one piece at the very end, so that it is the file's last line.
    writeln!(out, "summary {written} {} {over_100_ms}", longest.as_micros())?;
    Ok(())
}

/// What became of one writer's lines.
#[derive(Debug, Default)]
struct Found {
    written: u64,
    there: u64,
    dropped: u64,
    longest_us: u64,
    over_100_ms: u64,
}

pub(crate) fn run() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let exe = std::env::current_exe()?;
    let keeper = cluster.agents[0].process().pid();
    let agent = cluster.agents[0].agent_pid();
    let before = [peak_kib(agent), peak_kib(keeper)];
    let manifest = format!(
        "name = \"flood\"\ncommand = [{:?}, \"{WRITER}\"]\ncount = {WRITERS}\nrestart.policy = \"never\"\nlogs.max_size = \"1GiB\"\n",
        exe.display().to_string()
    );
    cluster.apply(&manifest, &[]).expect(0);
    eventually("all writers have ended", WRITES_FOR * 4, || {
        let rows = cluster.ps("flood");
        rows.len() == WRITERS && rows.iter().all(|row| row["observed"] == "exited")
    });
    let after = [peak_kib(agent), peak_kib(keeper)];
    let folders = std::fs::read_dir(cluster.agents[0].dir.join("data/logs/flood"))?;
    let mut all = BTreeMap::new();
    for folder in folders {
        let folder = folder?.path();
        all.insert(folder.clone(), look(&folder).with_context(|| format!("in {}", folder.display()))?);
    }
    print(&all, before, after);
    ensure!(all.len() == WRITERS, "{} logs of {WRITERS}", all.len());
    for found in all.values() {
        ensure!(found.there + found.dropped == found.written, "lines are unaccounted for: {found:?}");
    }
    Ok(())
}

/// Reads a log from its first to its last line: rising numbers, and each gap as long as was said.
fn look(folder: &Path) -> anyhow::Result<Found> {
    let mut found = Found::default();
    let mut next = 0;
    let mut said_missing = 0;
    for file in segments(folder)? {
        let text = String::from_utf8(std::fs::read(file)?)?;
        for line in text.lines() {
            let (_, rest) = line.split_once(" stderr ").with_context(|| format!("no such line: {line}"))?;
            if let Some(dropped) = rest.strip_prefix("D ") {
                let count: u64 = dropped.split(' ').next().unwrap_or_default().parse()?;
                said_missing += count;
                found.dropped += count;
                continue;
            }
            let text = rest.get(2..).unwrap_or_default();
            if let Some(summary) = text.strip_prefix("summary ") {
                let numbers: Vec<u64> = summary.split(' ').map(str::parse).collect::<Result<_, _>>()?;
                (found.written, found.longest_us, found.over_100_ms) = (numbers[0], numbers[1], numbers[2]);
                continue;
            }
            let number: u64 = text.split(' ').next().unwrap_or_default().parse()?;
            ensure!(
                number == next + said_missing,
                "{number} follows after {next}, {said_missing} said missing"
            );
            (next, said_missing) = (number + 1, 0);
            found.there += 1;
        }
    }
    Ok(found)
}

fn segments(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "log"));
    files.sort();
    Ok(files)
}

fn print(all: &BTreeMap<PathBuf, Found>, before: [u64; 2], after: [u64; 2]) {
    let sum = |of: fn(&Found) -> u64| all.values().map(of).sum::<u64>();
    let longest = all.values().map(|found| found.longest_us).max().unwrap_or_default();
    println!(
        "| writers | lines written | in the files | counted as dropped | longest write | writes over 100 ms |"
    );
    println!("|---|---|---|---|---|---|");
    println!(
        "| {WRITERS} | {} | {} | {} | {}.{:03} ms | {} |",
        sum(|found| found.written),
        sum(|found| found.there),
        sum(|found| found.dropped),
        longest / 1000,
        longest % 1000,
        sum(|found| found.over_100_ms)
    );
    println!("\n| role | peak resident before, KiB | after |\n|---|---|---|");
    for (role, (before, after)) in ["agent", "keeper"].iter().zip(before.iter().zip(after)) {
        println!("| {role} | {before} | {after} |");
    }
}

/// The most memory that a process has had at once.
fn peak_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse().unwrap_or_default()
}
