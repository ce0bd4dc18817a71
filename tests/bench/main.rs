//! Measurements on real processes, printed as the tables of docs/performance.md. Not part of `make test`: a figure is
//! no pass or fail. `nave-bench all`, or one of the names below.
#![expect(clippy::print_stdout, reason = "its product is what it prints")]

mod calls;
mod etcd;
mod failover;
mod faults;
mod fleet;
mod hosts;
mod idle;
mod load;
mod output;
mod plan;
mod proxy;
mod start;
mod supervise;
mod throughput;
mod watchers;

use anyhow::bail;

type Measurement = fn() -> anyhow::Result<()>;

fn main() -> anyhow::Result<()> {
    let what = std::env::args().nth(1).unwrap_or_else(|| "all".to_owned());
    if what == output::WRITER {
        return output::write();
    }
    if what == proxy::SOURCE {
        return proxy::source();
    }
    if what == calls::ANSWER {
        return calls::answer();
    }
    let all = what == "all";
    machine();
    let mut known = false;
    let rooms: [(&str, Measurement); 13] = [
        ("start", start::run),
        ("idle", idle::run),
        ("throughput", throughput::run),
        ("failover", failover::run),
        ("plan", || {
            plan::run();
            Ok(())
        }),
        ("fleet", fleet::run),
        ("watchers", watchers::run),
        ("faults", faults::run),
        ("hosts", hosts::run),
        ("output", output::run),
        ("supervise", supervise::run),
        ("proxy", proxy::run),
        ("calls", calls::run),
    ];
    for (name, run) in &rooms {
        if all || what == *name {
            known = true;
            println!("\n## {name}\n");
            run()?;
        }
    }
    if !known {
        let known: Vec<&str> = rooms.iter().map(|(name, _)| *name).collect();
        bail!("{what:?} is none of: all, {}", known.join(", "));
    }
    Ok(())
}

/// The parts of one measurement: all of them, or the one that is named after it.
fn rooms(rooms: &[(&str, Measurement)]) -> anyhow::Result<()> {
    let only = std::env::args().nth(2);
    if let Some(only) = only.as_ref().filter(|only| !rooms.iter().any(|(name, _)| name == only)) {
        let known: Vec<&str> = rooms.iter().map(|(name, _)| *name).collect();
        bail!("{only:?} is none of: {}", known.join(", "));
    }
    for (name, room) in rooms {
        if only.as_ref().is_none_or(|only| only == name) {
            println!("\n### {name}\n");
            room()?;
        }
    }
    Ok(())
}

fn machine() {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown");
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("machine: {model}, {cores} cores, Linux {}", kernel.trim());
}
