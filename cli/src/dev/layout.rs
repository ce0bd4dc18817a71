//! What is where in a dev directory, and how it is made the first time. The number of members and the ports are
//! fixed then, since members know each other by address; agents can be added later.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nave_agent::AgentConfig;
use serde::{Deserialize, Serialize};

use super::role::{Kind, Role};
use super::{ports, prefix};
use crate::args;
use crate::context::plain;
use crate::failure::Failure;
use crate::init::{self, NewCluster, NewMember};
use crate::out;

const MEMBERS: u8 = 3;
const AGENTS: u8 = 1;
const PORT: u16 = 7400;
/// The first token is for agents that start at once.
const TOKEN_TTL: Duration = Duration::from_secs(24 * 3600);
/// Offsets from `--port`, see DESIGN 5.
const AGENT_PORTS: u16 = 10;
const MEMBER_METRICS: u16 = 80;
const AGENT_METRICS: u16 = 90;

/// `DIR/dev.toml`: what was chosen when the directory was made, and what has happened since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Choices {
    members: u8,
    agents: u8,
    port: u16,
    /// Agents that have joined; the rest need a token that still works.
    enrolled: u8,
}

/// A dev directory.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) dir: PathBuf,
    pub(super) client_file: PathBuf,
    pub(super) token_file: PathBuf,
    pub(super) members: Vec<Role>,
    pub(super) agents: Vec<Role>,
    choices: Choices,
    /// Made in this run, so that its first token is still good.
    fresh: bool,
}

impl Layout {
    pub(super) fn open_or_create(dir: &Path, args: &args::Dev) -> Result<Self, Failure> {
        let file = dir.join("dev.toml");
        let (choices, fresh) = match std::fs::read_to_string(&file) {
            Ok(text) => {
                let kept = toml::from_str(&text)
                    .map_err(|error| Failure::refused(format!("{}: {error}", file.display())))?;
                (merge(kept, args, dir)?, false)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (create(dir, args)?, true),
            Err(error) => {
                return Err(Failure::refused(format!("cannot read {}: {}", file.display(), plain(&error))));
            }
        };
        let layout = Self {
            members: (1..=choices.members).map(|number| member_role(dir, choices.port, number)).collect(),
            agents: (1..=choices.agents).map(|number| agent_role(dir, choices.port, number)).collect(),
            client_file: dir.join("client.toml"),
            token_file: dir.join("join-token"),
            dir: dir.to_owned(),
            choices,
            fresh,
        };
        for (number, role) in (1..).zip(&layout.agents) {
            layout.write_agent(number, role)?;
        }
        layout.remember(choices)?;
        Ok(layout)
    }

    /// `3 members and 1 agent`.
    pub(super) fn what(&self) -> String {
        let count =
            |number: usize, noun: &str| format!("{number} {noun}{}", if number == 1 { "" } else { "s" });
        format!("{} and {}", count(self.members.len(), "member"), count(self.agents.len(), "agent"))
    }

    /// Some agents have yet to join, and the token in the file may be too old for them.
    pub(super) fn needs_token(&self) -> bool {
        !self.fresh && self.choices.enrolled < self.choices.agents
    }

    pub(super) fn all_enrolled(&self) -> Result<(), Failure> {
        self.remember(Choices { enrolled: self.choices.enrolled.max(self.choices.agents), ..self.choices })
    }

    fn remember(&self, choices: Choices) -> Result<(), Failure> {
        let text = toml::to_string(&choices).context("write dev.toml as TOML")?;
        init::write(&self.dir.join("dev.toml"), 0o644, &text)
    }

    /// An agent's file stays as it is, but for a prefix that another agent on this machine has taken meanwhile.
    fn write_agent(&self, number: u8, role: &Role) -> Result<(), Failure> {
        let taken = prefix::taken(&self.dir);
        let wanted = 87 + number;
        let mut config = match AgentConfig::load(&role.config) {
            Ok(config) if role.running().is_some() || !taken.contains(&config.address_prefix) => {
                return Ok(());
            }
            Ok(config) => config,
            Err(_) => self.agent_config(number, role),
        };
        config.address_prefix = prefix::free(wanted, &taken, self.choices.agents)
            .ok_or_else(|| Failure::refused("no loopback prefix 127.N is left on this machine"))?;
        std::fs::create_dir_all(&role.folder).with_context(|| format!("make {}", role.folder.display()))?;
        let text = toml::to_string(&config).context("write agent.toml as TOML")?;
        init::write(&role.config, 0o644, &text)
    }

    fn agent_config(&self, number: u8, role: &Role) -> AgentConfig {
        let port = self.choices.port;
        let members = (1..=self.choices.members)
            .map(|number| format!("{}:{}", args::LOOPBACK, member_port(port, number)));
        let mut config = AgentConfig::new(role.folder.clone(), members.collect());
        config.token_file = Some(self.token_file.clone());
        config.name.clone_from(&role.name);
        // A developer's machine keeps the rules it has.
        config.firewall = false;
        config.listen = loopback(agent_port(port, number));
        config.advertise = Some(config.listen.to_string());
        config.metrics_listen = loopback(port + AGENT_METRICS + u16::from(number) - 1);
        config
    }
}

/// Makes everything but the agents' files.
fn create(dir: &Path, args: &args::Dev) -> Result<Choices, Failure> {
    refuse_strange(dir)?;
    let choices = Choices {
        members: args.members.unwrap_or(MEMBERS),
        agents: args.agents.unwrap_or(AGENTS),
        port: args.port.unwrap_or(PORT),
        enrolled: 0,
    };
    // Before anything is written: the port is fixed once the directory is made.
    let roles = (1..=choices.members).map(|number| member_role(dir, choices.port, number));
    let roles: Vec<Role> =
        roles.chain((1..=choices.agents).map(|number| agent_role(dir, choices.port, number))).collect();
    ports::refuse_taken(roles.iter())?;
    let members = (1..=choices.members).map(|number| {
        let role = member_role(dir, choices.port, number);
        let listen = loopback(member_port(choices.port, number));
        NewMember {
            address: listen.to_string(),
            listen,
            metrics_listen: loopback(choices.port + MEMBER_METRICS + u16::from(number) - 1),
            folder: role.folder,
            name: role.name,
        }
    });
    init::create(&NewCluster {
        dir: dir.to_owned(),
        members: members.collect(),
        operator: init::operator_name(),
        token_ttl: TOKEN_TTL,
    })?;
    Ok(choices)
}

/// A directory that holds something else is not made into a cluster's.
fn refuse_strange(dir: &Path) -> Result<(), Failure> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
    let strange = entries.filter_map(Result::ok).map(|entry| entry.file_name()).find(|name| {
        // Left by a start that was cut short before dev.toml was there: nothing has run yet.
        let name = name.to_string_lossy();
        let ours = ["dev.lock", "client.toml", "join-token", "ca.pem", "operator.pem", "operator.key"];
        !ours.contains(&&*name) && !name.ends_with(".new") && !name.starts_with("member-")
    });
    match strange {
        None => Ok(()),
        Some(name) => Err(Failure::refused(format!(
            "{} is not a directory of `nave dev`: it has {:?} in it and no dev.toml",
            dir.display(),
            name
        ))
        .next("choose another --data-dir")),
    }
}

/// What was asked for now, on top of what the directory has.
fn merge(kept: Choices, args: &args::Dev, dir: &Path) -> Result<Choices, Failure> {
    let fixed = |flag: &str, has: u16| {
        Failure::usage(format!("{} was made with {flag} {has}, which cannot be changed", dir.display()))
            .next(format!("leave out {flag}, or choose another --data-dir"))
    };
    if args.members.is_some_and(|members| members != kept.members) {
        return Err(fixed("--members", kept.members.into()));
    }
    if args.port.is_some_and(|port| port != kept.port) {
        return Err(fixed("--port", kept.port));
    }
    let agents = args.agents.unwrap_or(kept.agents);
    if agents < kept.agents {
        out::note(format_args!(
            "{} has {} agents; the last ones are not started",
            dir.display(),
            kept.agents
        ));
    }
    Ok(Choices { agents, ..kept })
}

fn member_role(dir: &Path, port: u16, number: u8) -> Role {
    let listen = member_port(port, number);
    let ports = vec![listen, port + MEMBER_METRICS + u16::from(number) - 1];
    role(dir, Kind::Member, format!("member-{number}"), "member.toml", ports)
}

fn agent_role(dir: &Path, port: u16, number: u8) -> Role {
    let ports = vec![agent_port(port, number), port + AGENT_METRICS + u16::from(number) - 1];
    role(dir, Kind::Agent, format!("agent-{number}"), "agent.toml", ports)
}

fn role(dir: &Path, kind: Kind, name: String, file: &str, ports: Vec<u16>) -> Role {
    let folder = dir.join(&name);
    Role { kind, config: folder.join(file), folder, name, ports }
}

fn member_port(port: u16, number: u8) -> u16 {
    port + u16::from(number) - 1
}

fn agent_port(port: u16, number: u8) -> u16 {
    port + AGENT_PORTS + u16::from(number) - 1
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> args::Dev {
        use clap::Parser as _;
        let words = ["nave", "dev"].into_iter().chain(line.split_whitespace());
        match args::Cli::parse_from(words).verb {
            args::Verb::Dev(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_new_directory_gets_the_ports_of_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open_or_create(dir.path(), &args("--agents 2 --port 9400")).unwrap();
        assert_eq!(layout.what(), "3 members and 2 agents");
        assert_eq!(layout.members[2].ports, [9402, 9482]);
        assert_eq!(layout.agents[1].ports, [9411, 9491]);
        let config = AgentConfig::load(&layout.agents[1].config).unwrap();
        assert_eq!(config.name, "agent-2");
        assert_eq!(config.listen, "127.0.0.1:9411".parse().unwrap());
        assert_eq!(config.join, ["127.0.0.1:9400", "127.0.0.1:9401", "127.0.0.1:9402"]);
        assert!(config.address_prefix.starts_with("127."));
        assert!(!layout.needs_token());
    }

    #[test]
    fn a_directory_is_used_again_and_agents_may_be_added() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open_or_create(dir.path(), &args("--members 1 --port 9500")).unwrap();
        layout.all_enrolled().unwrap();
        let client = std::fs::read(&layout.client_file).unwrap();
        let again = Layout::open_or_create(dir.path(), &args("")).unwrap();
        assert_eq!(again.what(), "1 member and 1 agent");
        assert!(!again.needs_token());
        assert_eq!(std::fs::read(&again.client_file).unwrap(), client);
        let more = Layout::open_or_create(dir.path(), &args("--agents 3")).unwrap();
        assert_eq!(more.agents.len(), 3);
        assert!(more.needs_token());
    }

    #[test]
    fn what_members_know_of_each_other_cannot_change() {
        let dir = tempfile::tempdir().unwrap();
        Layout::open_or_create(dir.path(), &args("--members 1 --port 9500")).unwrap();
        for flags in ["--members 3", "--port 9600"] {
            let failure = Layout::open_or_create(dir.path(), &args(flags)).unwrap_err();
            assert!(failure.to_string().contains("cannot be changed"), "{failure}");
        }
    }

    #[test]
    fn a_directory_of_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("thesis.tex"), "").unwrap();
        let failure = Layout::open_or_create(dir.path(), &args("")).unwrap_err();
        assert!(failure.to_string().contains("thesis.tex"), "{failure}");
    }
}
