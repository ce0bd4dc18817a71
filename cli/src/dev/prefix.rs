//! Loopback prefixes `127.N` that agents on this machine use, so that several `nave dev` do not share one. The
//! agents' own configuration files say so; which of them run, their command lines say.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use nave_agent::AgentConfig;

use super::process;

/// Prefixes of running agents that are not of `dir`.
pub(super) fn taken(dir: &Path) -> BTreeSet<String> {
    process::command_lines()
        .filter_map(|words| config_of(&words))
        .filter(|file| !file.starts_with(dir))
        .filter_map(|file| AgentConfig::load(&file).ok())
        .map(|config| config.address_prefix)
        .collect()
}

/// `nave agent --config FILE`.
fn config_of(words: &[String]) -> Option<PathBuf> {
    match words {
        [program, role, flag, file, ..]
            if role == "agent" && flag == "--config" && program.ends_with("nave") =>
        {
            Some(PathBuf::from(file))
        }
        _ => None,
    }
}

/// The wanted one, else the next that is not taken, in steps that keep the agents of one directory apart.
pub(super) fn free(wanted: u8, taken: &BTreeSet<String>, agents: u8) -> Option<String> {
    (0..)
        .map(|step| u32::from(wanted) + step * u32::from(agents.max(1)))
        .take_while(|second| *second <= 254)
        .map(|second| format!("127.{second}"))
        .find(|prefix| !taken.contains(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_prefix_is_passed_over() {
        let taken = ["127.88", "127.90"].map(str::to_owned).into();
        assert_eq!(free(88, &taken, 1).as_deref(), Some("127.89"));
        assert_eq!(free(88, &taken, 2).as_deref(), Some("127.92"));
        assert_eq!(free(89, &taken, 2).as_deref(), Some("127.89"));
        assert_eq!(free(254, &["127.254".to_owned()].into(), 1), None);
    }

    #[test]
    fn agents_are_known_by_their_command_line() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            config_of(&words("/usr/bin/nave agent --config /d/agent.toml")),
            Some("/d/agent.toml".into())
        );
        assert_eq!(config_of(&words("/usr/bin/vim agent --config /d/agent.toml")), None);
        assert_eq!(config_of(&words("nave orchestrator --config f")), None);
    }
}
