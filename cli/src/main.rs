//! The one binary `nave`: the roles (hub member, keeper, agent) and the person in front of them.
//!
//! The keeper and the exec stub are told apart before anything else is set up: they live as long as the services do
//! and must stay small, so they see neither tokio nor clap nor a logger. `main` alone ends the process, and prints
//! an error once.

mod agent;
mod allocator;
mod args;
mod client;
mod clock;
mod context;
mod dev;
mod early;
mod failure;
mod init;
mod manifests;
mod member_folder;
mod out;
mod progress;
mod roles;
mod table;
mod tls;
mod verbs;
mod when;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::args::{AgentCommand, Cli, ClusterVerb, Verb};
use crate::context::Context;
use crate::failure::Failure;

#[global_allocator]
static ALLOCATOR: allocator::ByRole = allocator::ByRole;

fn main() -> ExitCode {
    if let Some(code) = roles::before_everything() {
        return code;
    }
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            out::error(&failure);
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    match cli.verb {
        Verb::Orchestrator(args) => roles::orchestrator(&args),
        Verb::Agent(AgentCommand { verb: Some(verb), .. }) => agent::run(&verb),
        Verb::Agent(AgentCommand { run, verb: None }) => roles::keeper(&run),
        Verb::AgentProcess(args) => roles::agent_process(&args),
        Verb::Dev(args) => dev::run(&args),
        Verb::Init(args) => init::run(&args),
        Verb::Cluster { verb: ClusterVerb::Restore(args) } => {
            roles::log_to_stderr("warn");
            verbs::snapshot::restore(&args)
        }
        Verb::Cluster { verb: ClusterVerb::Snapshot(args) } if args.verify => {
            verbs::snapshot::verify(&args.file)
        }
        Verb::Schema => {
            out::json(&nave_proto::manifest::json_schema());
            Ok(())
        }
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "nave", &mut script);
            out::raw(&script);
            Ok(())
        }
        Verb::Version => {
            out::line(format_args!("nave {}", env!("CARGO_PKG_VERSION")));
            Ok(())
        }
        verb => {
            roles::log_to_stderr("warn");
            let context = Context::load(cli.context.as_deref())?;
            roles::runtime()?.block_on(async {
                let hub = client::Hub::new(context)?;
                verbs::run(verb, &hub).await
            })
        }
    }
}
