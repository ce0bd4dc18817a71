//! `nave dev`: a whole cluster on this machine, each member and agent a process of its own, as in production, with
//! this process as the init system. What it starts outlives it: after `kill -9` everything runs on, and the next
//! `nave dev` of the same directory adopts it. Only a signal takes it all down, in the order of flow.

mod layout;
mod lock;
mod ports;
mod prefix;
mod process;
mod ready;
mod role;
mod stop;
mod supervise;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use self::layout::Layout;
use self::lock::Lock;
use self::supervise::Supervised;
use crate::client::Hub;
use crate::context::{self, Context};
use crate::failure::Failure;
use crate::{args, out, roles};

pub(crate) fn run(args: &args::Dev) -> Result<(), Failure> {
    roles::log_to_stderr("warn");
    let dir = directory(args)?;
    let lock = Lock::take(&dir)?;
    let layout = Layout::open_or_create(&dir, args)?;
    let runtime = roles::runtime()?;
    let ended = runtime.block_on(live(&layout));
    runtime.shutdown_background();
    drop(lock);
    ended
}

/// Absolute and without symbolic links, since the paths on a role's command line are what it is known by.
fn directory(args: &args::Dev) -> Result<PathBuf, Failure> {
    let chosen = match &args.data_dir {
        Some(dir) => dir.clone(),
        None => context::default_dev_dir()
            .ok_or_else(|| Failure::usage("HOME is not set: choose a directory with --data-dir"))?,
    };
    std::fs::create_dir_all(&chosen).and_then(|()| chosen.canonicalize()).map_err(|error| {
        Failure::refused(format!("cannot use {}: {}", chosen.display(), context::plain(&error)))
    })
}

/// From the first process to the last.
async fn live(layout: &Layout) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let mut supervised = Supervised::default();
    let asked = tokio::select! {
        failed = serve(layout, &mut supervised) => Err(failed),
        name = signals.next() => Ok(name),
    };
    match asked {
        Ok(name) => {
            say(format_args!("{name}: stopping"));
            stop::all(supervised, &mut signals).await
        }
        Err(failure) => {
            stop::all(supervised, &mut signals).await?;
            Err(failure)
        }
    }
}

/// Starts everything, says when it is ready, and goes on; returns only when that cannot be done.
async fn serve(layout: &Layout, supervised: &mut Supervised) -> Failure {
    match start(layout, supervised).await {
        Ok(()) => std::future::pending().await,
        Err(failure) => failure,
    }
}

async fn start(layout: &Layout, supervised: &mut Supervised) -> Result<(), Failure> {
    let begun = Instant::now();
    let members = role::with_running(&layout.members);
    let agents = role::with_running(&layout.agents);
    let adopted = members.iter().chain(&agents).filter(|(_, process)| process.is_some()).count();
    ports::refuse_taken(
        members.iter().chain(&agents).filter(|(_, process)| process.is_none()).map(|(role, _)| role),
    )?;
    let all = members.len() + agents.len();
    match adopted {
        0 => say(format_args!("starting {} in {}", layout.what(), layout.dir.display())),
        _ => say(format_args!("adopting {adopted} of {all} processes that run in {}", layout.dir.display())),
    }
    supervised.start(members)?;
    let hub = Hub::new(Context::load(Some(&layout.client_file))?)?;
    if layout.needs_token() {
        let token = ready::fresh_token(&hub).await;
        crate::init::write(&layout.token_file, 0o600, &format!("{token}\n"))?;
    }
    supervised.start(agents)?;
    let leader = ready::wait(&hub, layout, supervised).await;
    layout.all_enrolled()?;
    announce(layout, &leader, begun.elapsed());
    Ok(())
}

fn announce(layout: &Layout, leader: &str, took: Duration) {
    say(format_args!("ready after {:.1} s: {}, {leader} leads", took.as_secs_f32(), layout.what()));
    out::line(format_args!(
        "\n  {}\n",
        out::paint(out::Tone::Bold, &format!("export NAVE_CONTEXT={}", layout.client_file.display()))
    ));
    let example = std::path::Path::new("examples/hello.toml").exists();
    let apply =
        if example { "nave apply -f examples/hello.toml --wait" } else { "nave apply -f FILE --wait" };
    for next in [apply, "nave services", "nave cluster status"] {
        out::line(format_args!("  {next}"));
    }
    out::line(format_args!("\nlogs are in {}/*/nave.log; Ctrl-C stops everything", layout.dir.display()));
    out::flush();
}

/// A line about what dev itself does.
fn say(text: impl std::fmt::Display) {
    out::line(format_args!("nave dev: {text}"));
    out::flush();
}

/// SIGINT and SIGTERM.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
