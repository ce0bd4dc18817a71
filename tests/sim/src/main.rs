//! `nave-sim --seeds N [--from M]` runs so many worlds and says what broke; `nave-sim --seed N` runs one and prints its
//! history, `--short` after making it as short as it gets. `--bug NAME` makes a mistake on purpose.
#![expect(clippy::print_stdout, reason = "its product is what it prints")]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use nave_sim::{Bug, Run, run, shorten, told};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const USAGE: &str = "usage: nave-sim (--seed N [--short] | --seeds N [--from M]) [--bug NAME]";

#[derive(Debug, Default)]
struct Args {
    seed: Option<u64>,
    seeds: Option<u64>,
    from: u64,
    short: bool,
    bug: Option<Bug>,
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(what) => {
            println!("{what}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // A core that panics is reported with its seed; the hook's own lines would only bury it.
    std::panic::set_hook(Box::new(|_| {}));
    match (args.seed, args.seeds) {
        (Some(seed), None) => one(seed, &args),
        (None, Some(count)) => many(count, &args),
        (None, None) | (Some(_), Some(_)) => {
            println!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut args = Args { from: 1, ..Args::default() };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text} is not a number"));
        match word.as_str() {
            "--seed" => args.seed = Some(number(value()?)?),
            "--seeds" => args.seeds = Some(number(value()?)?),
            "--from" => args.from = number(value()?)?,
            "--short" => args.short = true,
            "--bug" => {
                let name = value()?;
                let known = Bug::ALL.into_iter().find(|(known, _)| *known == name);
                let names = Bug::ALL.map(|(name, _)| name).join(", ");
                args.bug = Some(known.ok_or(format!("{name} is none of: {names}"))?.1);
            }
            _ => return Err(format!("{word} is not known")),
        }
    }
    Ok(args)
}

fn one(seed: u64, args: &Args) -> ExitCode {
    let shown = match args.short {
        true => shorten(seed, args.bug).map(|short| {
            println!("{} acts shortened to {}", short.acts_before, short.run.acts);
            short.run
        }),
        false => None,
    };
    let shown = shown.unwrap_or_else(|| run(seed, args.bug, true));
    for line in &shown.trace {
        println!("{line}");
    }
    match &shown.violation {
        Some(violation) => {
            println!("seed {seed} BREAKS {}", told(violation));
            ExitCode::FAILURE
        }
        None => {
            println!("seed {seed}: no violation");
            ExitCode::SUCCESS
        }
    }
}

#[derive(Debug, Default)]
struct Sum {
    runs: u64,
    broken: u64,
    lived: i64,
    events: u64,
    entries: u64,
    processes: u64,
}

impl Sum {
    fn add(&mut self, run: &Run) {
        self.runs += 1;
        self.lived += run.lived;
        self.events += run.events;
        self.entries += run.entries;
        self.processes += run.processes;
    }
}

fn many(count: u64, args: &Args) -> ExitCode {
    #[expect(clippy::disallowed_types, reason = "no runtime here to ask for the time")]
    let began = std::time::Instant::now();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let next = AtomicU64::new(args.from);
    let end = args.from + count;
    let (sender, receiver) = mpsc::channel::<(u64, Run)>();
    let mut sum = Sum::default();
    std::thread::scope(|scope| {
        for _ in 0..cores {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || sender.send((seed, run(seed, args.bug, false))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (seed, run) in receiver {
            sum.add(&run);
            if let Some(violation) = &run.violation {
                sum.broken += 1;
                println!("seed {seed} BREAKS {}", told(violation));
            }
        }
    });
    let took = began.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let hours = sum.lived as f64 / 3.6e12;
    println!(
        "{} seeds, {} broken; {hours:.0} cluster-hours in {took:.1} s ({:.0} per second, {cores} threads); {} events, {} log \
         entries, {} processes started",
        sum.runs,
        sum.broken,
        hours / took,
        sum.events,
        sum.entries,
        sum.processes
    );
    if sum.broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
