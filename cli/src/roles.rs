//! The long-lived processes: a hub member, a host's keeper, its agent. Here they get what every one of them needs
//! from outside: configuration, a runtime, logs on stderr, and the signal that ends them.

use std::ffi::OsString;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use nave_agent::AgentConfig;
use nave_keeper::KeeperOptions;
use nave_orchestrator::MemberConfig;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::args;
use crate::failure::Failure;
use crate::out;

/// Half of the cores, at least one and at most four: the log, the state database and RocksDB have threads of their
/// own, and on a small machine a second worker costs more in waking it than it does: with three members on two
/// cores one client got 495 writes/s with two workers and 938 with one (docs/performance.md).
fn runtime_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).clamp(1, 4))
}

/// Runs the exec stub or the keeper, when the command line plainly asks for one. Anything else, `--help` and
/// mistakes included, is left to clap.
pub(crate) fn before_everything() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next()?.to_str()? {
        "exec-stub" => nave_keeper::exec_stub_main(),
        "exec-check" => nave_keeper::exec_check_main(),
        "artifact-stub" => Some(nave_agent::artifact_stub_main(arguments, std::env::var_os("SSL_CERT_FILE"))),
        "agent" => {
            let args = plain_agent_args(arguments)?;
            Some(match keeper(&args) {
                Ok(()) => ExitCode::SUCCESS,
                Err(failure) => {
                    out::error(&failure);
                    ExitCode::from(failure.exit as u8)
                }
            })
        }
        _ => None,
    }
}

/// The few flags of `nave agent` without clap's help; nothing when they are not exactly right.
fn plain_agent_args(arguments: impl Iterator<Item = OsString>) -> Option<args::Agent> {
    let mut parsed = args::Agent::default();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let argument = argument.into_string().ok()?;
        let (flag, value) = match argument.split_once('=') {
            Some((flag, value)) => (flag.to_owned(), OsString::from(value)),
            None => (argument, arguments.next()?),
        };
        match flag.as_str() {
            "--config" if parsed.config.is_none() => parsed.config = Some(value.into()),
            "--token-file" if parsed.token_file.is_none() => parsed.token_file = Some(value.into()),
            "--data-dir" if parsed.data_dir.is_none() => parsed.data_dir = Some(value.into()),
            "--join" if parsed.join.is_empty() => {
                parsed.join = value.to_str()?.split(',').map(str::to_owned).collect();
            }
            _ => return None,
        }
    }
    let by_file = parsed.config.is_some();
    let by_flags = parsed.data_dir.is_some() && !parsed.join.is_empty();
    let no_flags = parsed.data_dir.is_none() && parsed.join.is_empty() && parsed.token_file.is_none();
    ((by_file && no_flags) || (!by_file && by_flags)).then_some(parsed)
}

/// This host's keeper, for its whole life.
pub(crate) fn keeper(args: &args::Agent) -> Result<(), Failure> {
    let config = agent_config(args)?;
    let options = KeeperOptions {
        data_dir: absolute(&config.data_dir)?,
        agent_command: agent_command(args, "agent-process")?,
    };
    drop(config);
    nave_keeper::keeper_main(options).context("the keeper ended").map_err(Failure::from)
}

/// How the keeper starts the agent (`agent-process`), or a unit the keeper (`agent`): this program, with the same words,
/// and paths that hold in any directory.
pub(crate) fn agent_command(args: &args::Agent, verb: &str) -> anyhow::Result<Vec<OsString>> {
    let program = std::env::current_exe().context("find this program")?;
    let mut command: Vec<OsString> = vec![program.into(), verb.into()];
    if let Some(config) = &args.config {
        command.extend(["--config".into(), absolute(config)?.into()]);
    }
    if !args.join.is_empty() {
        command.extend(["--join".into(), args.join.join(",").into()]);
    }
    if let Some(file) = &args.token_file {
        command.extend(["--token-file".into(), absolute(file)?.into()]);
    }
    if let Some(directory) = &args.data_dir {
        command.extend(["--data-dir".into(), absolute(directory)?.into()]);
    }
    Ok(command)
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("find {}", path.display()))
}

pub(crate) fn agent_config(args: &args::Agent) -> anyhow::Result<AgentConfig> {
    if let Some(file) = &args.config {
        return Ok(AgentConfig::load(file)?);
    }
    let data_dir = args.data_dir.clone().context("--data-dir is missing")?;
    let mut config = AgentConfig::new(data_dir, args.join.clone());
    config.token_file.clone_from(&args.token_file);
    config.check()?;
    Ok(config)
}

/// The agent itself; its keeper starts it.
pub(crate) fn agent_process(args: &args::Agent) -> Result<(), Failure> {
    log_to_stderr(ROLE_LOG);
    let config = agent_config(args)?;
    until_signalled(|shutdown| async {
        let mut rests = signal(SignalKind::user_defined1()).context("listen for SIGUSR1")?;
        let rest = CancellationToken::new();
        let mut agent = pin!(nave_agent::run(config, shutdown, rest.clone()));
        loop {
            tokio::select! {
                ended = &mut agent => return ended.map_err(anyhow::Error::from),
                // From the keeper: services end first.
                _ = rests.recv() => rest.cancel(),
            }
        }
    })
}

/// One hub member.
pub(crate) fn orchestrator(args: &args::Orchestrator) -> Result<(), Failure> {
    log_to_stderr(ROLE_LOG);
    let config = MemberConfig::load(&args.config).map_err(anyhow::Error::from)?;
    if let Some(file) = &args.pid_file {
        write_pid(file).with_context(|| format!("write {}", file.display()))?;
    }
    until_signalled(|shutdown| async {
        nave_orchestrator::run(config, shutdown).await.map_err(anyhow::Error::from)
    })
}

/// Whole or not at all, so that nobody reads half a number.
fn write_pid(file: &Path) -> std::io::Result<()> {
    let fresh = file.with_extension("pid.new");
    std::fs::write(&fresh, format!("{}\n", std::process::id()))?;
    std::fs::rename(&fresh, file)
}

/// Runs a role until it ends by itself or, asked by SIGTERM or SIGINT, in its own good time. A second signal ends
/// it at once.
fn until_signalled<F>(run: impl FnOnce(CancellationToken) -> F) -> Result<(), Failure>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let shutdown = CancellationToken::new();
        let role = run(shutdown.clone());
        let mut settled = pin!(tokio::time::sleep(SETTLED));
        let mut lean = false;
        tokio::pin!(role);
        loop {
            tokio::select! {
                ended = &mut role => return ended,
                () = &mut settled, if !lean => {
                    lean = true;
                    release_startup_pages();
                    continue;
                }
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if shutdown.is_cancelled() {
                anyhow::bail!("ended by a second signal before it was down");
            }
            tracing::info!("asked to end");
            shutdown.cancel();
        }
    });
    // What is still blocked in a thread of the runtime must not keep the process.
    runtime.shutdown_background();
    ended.map_err(Failure::from)
}

/// A role that has been up this long is past its start.
const SETTLED: Duration = Duration::from_secs(5);

fn release_startup_pages() {
    match nave_keeper::memory::release_startup_pages() {
        Ok(bytes) => tracing::debug!(bytes, "gave back the pages of the program that starting up needed"),
        Err(error) => tracing::debug!(%error, "cannot give back pages of the program"),
    }
}

pub(crate) fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(runtime_workers())
        .thread_name("nave")
        .enable_all()
        .build()
        .context("start the runtime")
}

/// Raft's own steps are for `NAVE_LOG=openraft=info`.
const ROLE_LOG: &str = "info,openraft=warn";

/// Logs go to stderr, as much as `NAVE_LOG` or `RUST_LOG` asks for.
pub(crate) fn log_to_stderr(default: &str) {
    let wanted = ["NAVE_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok());
    let filter = wanted.as_deref().filter(|text| !text.is_empty()).unwrap_or(default);
    let (filter, wrong) = match EnvFilter::try_new(filter) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(default), Some(error)),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(out::colour_stderr())
        .init();
    if let Some(error) = wrong {
        tracing::warn!(%error, "NAVE_LOG or RUST_LOG cannot be understood, logging as by default");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(line: &str) -> Option<args::Agent> {
        plain_agent_args(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_light_path_reads_what_clap_reads() {
        use clap::Parser as _;
        for line in [
            "--config a.toml",
            "--config=a.toml",
            "--join a:1,b:2 --token-file t --data-dir d",
            "--data-dir=d --join=a:1",
        ] {
            let words = ["nave", "agent"].into_iter().chain(line.split_whitespace());
            let args::Verb::Agent(by_clap) = args::Cli::parse_from(words).verb else {
                panic!("another verb")
            };
            assert_eq!(plain(line), Some(by_clap.run), "{line}");
        }
    }

    #[test]
    fn what_is_odd_is_left_to_clap() {
        for line in [
            "",
            "--help",
            "upgrade --data-dir d",
            "--config",
            "--config a --data-dir d",
            "--join a",
            "--frob x",
            "--config a --config b",
        ] {
            assert_eq!(plain(line), None, "{line}");
        }
    }

    #[test]
    fn the_agent_is_started_with_paths_that_hold_anywhere() {
        let args = plain("--join a:1,b:2 --token-file t --data-dir /d").unwrap();
        let command = agent_command(&args, "agent-process").unwrap();
        let here = std::env::current_dir().unwrap();
        let words: Vec<_> = command[1..].iter().map(|word| word.to_str().unwrap()).collect();
        let token_file = here.join("t");
        assert_eq!(
            words,
            [
                "agent-process",
                "--join",
                "a:1,b:2",
                "--token-file",
                token_file.to_str().unwrap(),
                "--data-dir",
                "/d"
            ]
        );
    }
}
