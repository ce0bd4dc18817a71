//! The command line of DESIGN 5 as clap's tree. It is a contract with people and scripts: words and defaults
//! here change only together with that page.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use jiff::Timestamp;

use crate::when;

const AFTER_HELP: &str = "\
Begin with:
  nave dev                              a whole cluster on this machine
  nave apply -f examples/hello.toml --wait
  nave status hello

Exit codes: 0 done, 1 refused or failed, 2 wrong usage or invalid manifest, 3 not reachable or outcome unknown.";

/// Runs service processes on a fleet of Linux hosts and connects them.
#[derive(Debug, Parser)]
#[command(name = "nave", version, after_help = AFTER_HELP, infer_subcommands = false, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Client file: addresses, CA and certificate [default: ~/.config/nave/client.toml]
    #[arg(long, global = true, env = "NAVE_CONTEXT", hide_env_values = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) context: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Submit manifests
    Apply(Apply),
    /// List services
    #[command(visible_alias = "ls")]
    Services(Listing),
    /// List instances: where they run, since when, and why not
    Ps(Ps),
    /// List hosts, or give one up
    Hosts(Hosts),
    /// Empty a host for maintenance: nothing new goes there, what is there moves away under the update rules
    Drain(Drain),
    /// Open a drained host again
    Undrain {
        /// Name or id of the host
        host: String,
    },
    /// List the addresses where instances of a service answer
    Endpoints(OfService),
    /// One service: version, deployment, instances, last events, and why anything is not ready; without one: the hub, the
    /// hosts and the services
    Status(Status),
    /// Output of all instances of a service, on all hosts, merged by time
    Logs(Logs),
    /// Lifecycle history: who, what, why
    Events(Events),
    /// Print the address that local clients of a service use
    Url(Url),

    /// Change how many instances a service has
    Scale(Scale),
    /// Replace all processes of a service, a few at a time
    Restart(Change),
    /// Go back to an earlier version of a service
    Rollback(Rollback),
    /// Halt the rollout of a service where it is
    Pause { service: String },
    /// Let a paused rollout go on
    Resume(Change),
    /// The canaries of a new version are good: replace the rest
    Promote(Change),
    /// Stop a service and forget it
    Delete(Change),

    /// The hub itself: status, leadership, members
    Cluster {
        #[command(subcommand)]
        verb: ClusterVerb,
    },
    /// Join tokens for agents
    Token {
        #[command(subcommand)]
        verb: TokenVerb,
    },

    /// Run a whole cluster on this machine, to develop and to try
    Dev(Dev),
    /// Make keys and configuration of a new cluster
    Init(Init),
    /// Run one hub member
    Orchestrator(Orchestrator),
    /// Run this host's keeper and agent
    Agent(AgentCommand),
    /// Run the agent itself; its keeper starts it
    #[command(hide = true)]
    AgentProcess(Agent),

    /// Print the JSON Schema of the manifest
    Schema,
    /// Print shell completions
    Completions { shell: clap_complete::Shell },
    /// Print the version of this program
    Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct Listing {
    /// How to print the answer
    #[arg(short = 'o', long = "output", value_enum, default_value = "table", value_name = "FORMAT")]
    pub(crate) format: Format,
}

impl Listing {
    pub(crate) fn json(&self) -> bool {
        self.format == Format::Json
    }
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Hosts {
    #[command(flatten)]
    pub(crate) listing: Listing,
    #[command(subcommand)]
    pub(crate) verb: Option<HostsVerb>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostsVerb {
    /// Give a host up for good: one that is lost or silent, or a drained one that is empty
    Forget {
        /// Name or id of the host
        host: String,
        /// Told in `nave events`
        #[arg(long, default_value = "")]
        reason: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// Name or id of the host
    pub(crate) host: String,
    /// Told in `nave hosts` and `nave events`
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
    /// Return only when its agent has said that nothing is left: 0, or 1 with what is waited for
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, default_value = "5m", value_parser = when::parse_duration, value_name = "DURATION")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct OfService {
    pub(crate) service: String,
    #[command(flatten)]
    pub(crate) listing: Listing,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    pub(crate) service: Option<String>,
    #[command(flatten)]
    pub(crate) listing: Listing,
}

#[derive(Debug, Args)]
pub(crate) struct Waiting {
    /// Return only when it is done: 0 when every instance is ready, 1 with the reason when not
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, default_value = "60s", value_parser = when::parse_duration, value_name = "DURATION")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Apply {
    /// A manifest (.toml, .yaml, .json), a directory of them, or - for standard input; may be repeated
    #[arg(short = 'f', long = "file", required = true, value_name = "FILE|DIR|-", value_hint = ValueHint::AnyPath)]
    pub(crate) files: Vec<PathBuf>,
    /// Print what would change, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) waiting: Waiting,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    pub(crate) service: Option<String>,
    /// Only instances on this host
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<String>,
    #[command(flatten)]
    pub(crate) listing: Listing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stream {
    All,
    Stdout,
    Stderr,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    pub(crate) service: String,
    /// Go on with new lines as they are written
    #[arg(short = 'f', long)]
    pub(crate) follow: bool,
    /// Begin with the last N lines of each instance
    #[arg(long, value_name = "N")]
    pub(crate) tail: Option<u32>,
    /// Only lines since then: 5m ago, or a time such as 2026-11-26T14:00:00Z
    #[arg(long, value_parser = when::parse_since, value_name = "T")]
    pub(crate) since: Option<Timestamp>,
    /// Only lines up to then, given as for --since
    #[arg(long, value_parser = when::parse_since, value_name = "T", conflicts_with = "follow")]
    pub(crate) until: Option<Timestamp>,
    /// Only lines with this text in them
    #[arg(long, value_name = "TEXT")]
    pub(crate) grep: Option<String>,
    /// Only this instance, for example i-42
    #[arg(long, value_name = "ID")]
    pub(crate) instance: Option<String>,
    /// Instead of its output, calls of it: of ports whose manifest says `calls.access_log = true`
    #[arg(long, conflicts_with_all = ["instance", "stream"])]
    pub(crate) access: bool,
    /// Only one of the two streams of a process
    #[arg(long, value_enum, default_value = "all")]
    pub(crate) stream: Stream,
    /// Begin each line with its time
    #[arg(long)]
    pub(crate) timestamps: bool,
    #[command(flatten)]
    pub(crate) listing: Listing,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Only events of this service
    #[arg(long, value_name = "S")]
    pub(crate) service: Option<String>,
    /// Only events of this host
    #[arg(long, value_name = "H")]
    pub(crate) host: Option<String>,
    /// Go on with new events as they happen
    #[arg(short = 'f', long)]
    pub(crate) follow: bool,
    /// How many of the last ones to begin with
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) tail: u32,
    #[command(flatten)]
    pub(crate) listing: Listing,
}

#[derive(Debug, Args)]
pub(crate) struct Url {
    pub(crate) service: String,
    /// The port's name in the manifest; needed when there are several
    pub(crate) port: Option<String>,
    /// Ask this agent (host:port) and no hub
    #[arg(long, value_name = "ADDR", env = "NAVE_AGENT")]
    pub(crate) agent: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Scale {
    pub(crate) service: String,
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) waiting: Waiting,
}

#[derive(Debug, Args)]
pub(crate) struct Change {
    pub(crate) service: String,
    #[command(flatten)]
    pub(crate) waiting: Waiting,
}

#[derive(Debug, Args)]
pub(crate) struct Rollback {
    pub(crate) service: String,
    /// The version to go back to [default: the last stable one before this]
    #[arg(long, value_name = "VERSION", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) to: Option<u64>,
    #[command(flatten)]
    pub(crate) waiting: Waiting,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterVerb {
    /// Members, leader, term and revision
    Status(Listing),
    /// Move leadership to another member
    Transfer {
        /// Name or id of the member [default: the most advanced one]
        #[arg(long, value_name = "MEMBER")]
        to: Option<String>,
    },
    /// Add a member: reserve its id, write its folder, and wait until it votes with --wait
    Add(AddMember),
    /// Add a member that takes another's place, in one change
    Replace {
        /// Name or id of the member that leaves; it may be dead
        old: String,
        #[command(flatten)]
        new: AddMember,
    },
    /// Remove a member, or give up one that is joining
    Remove(RemoveMember),
    /// Write a consistent, checksummed snapshot of the registry to a file
    Snapshot(TakeSnapshot),
    /// Make a stopped member's folder a hub of one with a snapshot's contents; asks no hub
    Restore(Restore),
}

#[derive(Debug, Args)]
pub(crate) struct TakeSnapshot {
    /// Where to; a file of that name is replaced once the new one is whole
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Take none: check the file that is there
    #[arg(long)]
    pub(crate) verify: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The snapshot
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// The stopped member's configuration; its data directory is set aside, not deleted
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, required_unless_present = "check")]
    pub(crate) config: Option<PathBuf>,
    /// Only check the snapshot
    #[arg(long)]
    pub(crate) check: bool,
    /// The snapshot is of another cluster: take its services over, not its hosts
    #[arg(long)]
    pub(crate) other_cluster: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AddMember {
    /// Address of the new member as everyone dials it, host or host:port
    #[arg(value_name = "ADDR")]
    pub(crate) address: String,
    /// Its name [default: member- and the number of its id]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Folder to write for it [default: its name, beside the client file]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) out: Option<PathBuf>,
    /// Folder that holds ca.pem and ca.key [default: a member's folder beside the client file]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) ca: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) waiting: Waiting,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveMember {
    /// Name or id
    pub(crate) member: String,
    /// How long to wait until it has left
    #[arg(long, default_value = "60s", value_parser = when::parse_duration, value_name = "DURATION")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenVerb {
    /// Make a join token and print it, once
    Create {
        /// How long it may be used
        #[arg(long, default_value = "1h", value_parser = when::parse_duration, value_name = "DURATION")]
        ttl: Duration,
        /// How many agents may join with it
        #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        uses: u32,
    },
    /// List tokens that can still be used
    List(Listing),
    /// Make a token useless
    Revoke {
        /// The token's id, as `nave token list` shows it
        id: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Dev {
    /// Hub members [default: 3, or what the data directory has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=7))]
    pub(crate) members: Option<u8>,
    /// Agents [default: 1, or what the data directory has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=60))]
    pub(crate) agents: Option<u8>,
    /// Where everything is kept [default: ~/.local/share/nave/dev]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// Members listen on P, P+1…; agents on P+10…; metrics on P+80… and P+90… [default: 7400, or what the data directory has]
    #[arg(long, value_name = "P", value_parser = clap::value_parser!(u16).range(1024..=65_000))]
    pub(crate) port: Option<u16>,
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Addresses of the members as everyone dials them, host or host:port, separated by commas
    #[arg(long, required = true, value_delimiter = ',', value_name = "ADDR,ADDR,ADDR")]
    pub(crate) members: Vec<String>,
    /// A directory to make; refused when it is not empty
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) out: PathBuf,
    /// How long the first join token may be used
    #[arg(long, default_value = "24h", value_parser = when::parse_duration, value_name = "DURATION")]
    pub(crate) token_ttl: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Orchestrator {
    /// Configuration file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: PathBuf,
    /// File to write this process's id to
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) pid_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct AgentCommand {
    #[command(flatten)]
    pub(crate) run: Agent,
    #[command(subcommand)]
    pub(crate) verb: Option<AgentVerb>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AgentVerb {
    /// Write the systemd units of keeper and agent, and of the services
    Install(AgentInstall),
    /// Replace the program of the keeper and agent that run here; services go on
    Upgrade(AgentUpgrade),
    /// Say whether this program could replace the one that runs
    #[command(hide = true)]
    Prove(Agent),
}

#[derive(Debug, Args)]
pub(crate) struct AgentInstall {
    #[command(flatten)]
    pub(crate) agent: Agent,
    /// Where the agent's unit goes; that of the services goes beside it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, default_value = "/etc/systemd/system/nave-agent.service")]
    pub(crate) unit: PathBuf,
    /// Print them instead
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AgentUpgrade {
    /// Configuration file of the agent
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, required_unless_present = "data_dir", conflicts_with = "data_dir")]
    pub(crate) config: Option<PathBuf>,
    /// Its data directory
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// The new program [default: the one that this command is]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) program: Option<PathBuf>,
}

/// Either a file, or the few things a first start needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub(crate) struct Agent {
    /// Configuration file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, required_unless_present_any = ["join", "data_dir"], conflicts_with_all = ["join", "token_file", "data_dir"])]
    pub(crate) config: Option<PathBuf>,
    /// Addresses of members, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "ADDR,…", requires = "data_dir")]
    pub(crate) join: Vec<String>,
    /// File that holds a join token; needed for the first start
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "data_dir")]
    pub(crate) token_file: Option<PathBuf>,
    /// Where the host keeps its identity, ledger and logs
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, requires = "join")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// The address a host name or address stands for when it has no port.
pub(crate) const MEMBER_PORT: u16 = 7400;
/// Where everything in `nave dev` listens.
pub(crate) const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn apply_takes_files_and_a_timeout() {
        let Verb::Apply(apply) = parse("nave apply -f a.toml -f b --wait --timeout 5s").unwrap().verb else {
            panic!("another verb")
        };
        assert_eq!(apply.files, [PathBuf::from("a.toml"), PathBuf::from("b")]);
        assert!(apply.waiting.wait && !apply.dry_run);
        assert_eq!(apply.waiting.timeout, Duration::from_secs(5));
    }

    #[test]
    fn the_context_may_follow_the_verb() {
        let cli = parse("nave services -o json --context here.toml").unwrap();
        assert_eq!(cli.context, Some(PathBuf::from("here.toml")));
    }

    #[test]
    fn an_agent_needs_a_file_or_a_cluster_to_join() {
        parse("nave agent --config a.toml").unwrap();
        parse("nave agent --join a:1,b:2 --token-file t --data-dir d").unwrap();
        assert_eq!(parse("nave agent").unwrap_err().exit_code(), 2);
        parse("nave agent upgrade --data-dir d --program p").unwrap();
        parse("nave agent install --config a.toml --print").unwrap();
        assert_eq!(parse("nave agent upgrade").unwrap_err().exit_code(), 2);
        assert_eq!(parse("nave agent install").unwrap_err().exit_code(), 2);
        assert_eq!(parse("nave agent --data-dir d").unwrap_err().exit_code(), 2);
        assert_eq!(parse("nave agent --config a --join b --data-dir c").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn wrong_usage_exits_2() {
        for line in ["nave frobnicate", "nave scale web", "nave apply", "nave apply -f a --timeout 5"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
