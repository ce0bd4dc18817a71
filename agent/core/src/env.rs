//! The environment and the arguments a process is started with: built from nothing, so that what the agent happens to
//! run with never leaks into a service, and as pure functions, so that `nave apply --dry-run` could show them.

use std::collections::{BTreeMap, BTreeSet};

use nave_proto::ids::{ClusterId, InstanceId};
use nave_proto::pb;

pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where instances listen: only the agent's proxy is reached from elsewhere.
pub const LISTEN_HOST: &str = "127.0.0.1";

/// What the environment is made of.
#[derive(Debug, Clone, Copy)]
pub struct EnvironmentInput<'a> {
    pub manifest: &'a pb::Manifest,
    pub ports: &'a BTreeMap<String, u16>,
    pub instance: InstanceId,
    pub ordinal: u32,
    pub version: u64,
    /// The host's name.
    pub host: &'a str,
    pub cluster: ClusterId,
    /// Of the user the process runs as.
    pub user: &'a str,
    pub home: &'a str,
    /// More variables, which the manifest's own win over, unless they are `NAVE_*`.
    pub given: &'a BTreeMap<String, String>,
}

/// Something expanded, and the names it asked for that nobody knows; those stay as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expanded<T> {
    pub value: T,
    pub unknown: BTreeSet<UnknownName>,
}

/// A name without a value, and where somebody wrote it, for people: `command`, `env URL`, `file app.toml`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnknownName {
    pub place: String,
    pub name: String,
}

/// The whole environment. The manifest's own variables win over the defaults, but not over `NAVE_*`. They may name
/// each other; a variable that names itself means the default (`PATH = "/opt/bin:${PATH}"`).
#[must_use]
pub fn environment(input: &EnvironmentInput<'_>) -> Expanded<BTreeMap<String, String>> {
    let base = base(input);
    let own = &input.manifest.env;
    let mut unknown = BTreeSet::new();
    let mut value = base.clone();
    for name in own.keys().filter(|name| !name.starts_with("NAVE_")) {
        let expanded = resolve(name, own, &base, &mut Vec::new(), &mut unknown);
        value.insert(name.clone(), expanded.unwrap_or_default());
    }
    Expanded { value, unknown }
}

fn base(input: &EnvironmentInput<'_>) -> BTreeMap<String, String> {
    let mut base: BTreeMap<String, String> = [
        ("PATH", DEFAULT_PATH.to_owned()),
        ("HOME", input.home.to_owned()),
        ("USER", input.user.to_owned()),
        ("HOST", LISTEN_HOST.to_owned()),
        ("NAVE_SERVICE", input.manifest.name.clone()),
        ("NAVE_INSTANCE", input.instance.to_string()),
        ("NAVE_HOST", input.host.to_owned()),
        ("NAVE_VERSION", input.version.to_string()),
        ("NAVE_ORDINAL", input.ordinal.to_string()),
        ("NAVE_CLUSTER", input.cluster.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    base.extend(input.given.iter().map(|(name, value)| (name.clone(), value.clone())));
    if let Some(port) = input.ports.values().next() {
        base.insert("PORT".to_owned(), port.to_string());
    }
    for (name, port) in input.ports {
        base.insert(port_variable(name), port.to_string());
    }
    base
}

/// `NAVE_PORT_HTTP`, `NAVE_PORT_ADMIN_API`.
#[must_use]
pub fn port_variable(name: &str) -> String {
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
    format!("NAVE_PORT_{name}")
}

/// One variable's value; `open` are those being resolved, to end a circle.
fn resolve(
    name: &str,
    own: &BTreeMap<String, String>,
    base: &BTreeMap<String, String>,
    open: &mut Vec<String>,
    unknown: &mut BTreeSet<UnknownName>,
) -> Option<String> {
    let own_value =
        own.get(name).filter(|_| !name.starts_with("NAVE_") && !open.iter().any(|one| one == name));
    let Some(text) = own_value else { return base.get(name).cloned() };
    open.push(name.to_owned());
    let value = expand(text, |inner| {
        let value = resolve(inner, own, base, open, unknown);
        if value.is_none() {
            unknown.insert(UnknownName { place: format!("env {name}"), name: inner.to_owned() });
        }
        value
    });
    open.pop();
    Some(value)
}

/// The arguments, expanded from the environment the process will have. `place`: see [`UnknownName`].
#[must_use]
pub fn arguments(
    place: &str,
    command: &[String],
    environment: &BTreeMap<String, String>,
) -> Expanded<Vec<String>> {
    let mut unknown = BTreeSet::new();
    let value = command
        .iter()
        .map(|argument| {
            expand(argument, |name| {
                let value = environment.get(name).cloned();
                if value.is_none() {
                    unknown.insert(UnknownName { place: place.to_owned(), name: name.to_owned() });
                }
                value
            })
        })
        .collect();
    Expanded { value, unknown }
}

/// Replaces `${NAME}`; `$$` is a dollar; any other dollar is itself, and so is a name without a value.
fn expand(text: &str, mut value_of: impl FnMut(&str) -> Option<String>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        if let Some(after) = tail.strip_prefix('$') {
            expanded.push('$');
            rest = after;
            continue;
        }
        let name =
            tail.strip_prefix('{').and_then(|tail| tail.split_once('}')).filter(|(name, _)| is_name(name));
        match name {
            Some((name, after)) => {
                match value_of(name) {
                    Some(value) => expanded.push_str(&value),
                    None => expanded.extend(["${", name, "}"]),
                }
                rest = after;
            }
            None => {
                expanded.push('$');
                rest = tail;
            }
        }
    }
    expanded.push_str(rest);
    expanded
}

fn is_name(text: &str) -> bool {
    let mut characters = text.chars();
    characters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && characters.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unknown<const N: usize>(names: [(&str, &str); N]) -> BTreeSet<UnknownName> {
        let owned = |(place, name): (&str, &str)| UnknownName { place: place.into(), name: name.into() };
        names.map(owned).into()
    }

    fn built(env: &[(&str, &str)], ports: &[(&str, u16)]) -> Expanded<BTreeMap<String, String>> {
        let pairs = env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        let manifest =
            pb::Manifest { name: "web".to_owned(), env: pairs.collect(), ..pb::Manifest::default() };
        let ports = ports.iter().map(|&(name, port)| (name.to_owned(), port)).collect();
        environment(&EnvironmentInput {
            given: &BTreeMap::new(),
            manifest: &manifest,
            ports: &ports,
            instance: InstanceId(42),
            ordinal: 1,
            version: 3,
            host: "north",
            cluster: ClusterId(7),
            user: "nave-web",
            home: "/var/lib/nave/web",
        })
    }

    #[test]
    fn environment_is_exactly_this() {
        let built = built(&[], &[("admin-api", 20_001), ("http", 20_002)]);
        let lines: Vec<_> = built.value.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let path = format!("PATH={DEFAULT_PATH}");
        let expected = [
            "HOME=/var/lib/nave/web",
            "HOST=127.0.0.1",
            "NAVE_CLUSTER=0000000000000007",
            "NAVE_HOST=north",
            "NAVE_INSTANCE=i-42",
            "NAVE_ORDINAL=1",
            "NAVE_PORT_ADMIN_API=20001",
            "NAVE_PORT_HTTP=20002",
            "NAVE_SERVICE=web",
            "NAVE_VERSION=3",
            &path,
            "PORT=20001",
            "USER=nave-web",
        ];
        assert_eq!(lines, expected);
        assert!(built.unknown.is_empty());
    }

    #[test]
    fn manifest_variables_expand_and_win_except_over_naves_own() {
        let env = [
            ("PATH", "/opt/bin:${PATH}"),
            ("URL", "http://${WHERE}/"),
            ("WHERE", "${HOST}:${PORT}"),
            ("NAVE_SERVICE", "forged"),
            ("LEFT", "${NOBODY}"),
        ];
        let built = built(&env, &[("http", 20_002)]);
        assert_eq!(built.value["PATH"], format!("/opt/bin:{DEFAULT_PATH}"));
        assert_eq!(built.value["URL"], "http://127.0.0.1:20002/");
        assert_eq!(built.value["NAVE_SERVICE"], "web");
        assert_eq!(built.value["LEFT"], "${NOBODY}");
        assert_eq!(built.unknown, unknown([("env LEFT", "NOBODY")]));
    }

    #[test]
    fn a_circle_ends_and_is_reported() {
        let built = built(&[("A", "${B}"), ("B", "${A}")], &[]);
        assert_eq!(built.value["A"], "${A}");
        assert_eq!(built.unknown, unknown([("env A", "B"), ("env B", "A")]));
    }

    #[test]
    fn dollars_follow_one_rule() {
        let environment = BTreeMap::from([("PORT".to_owned(), "8080".to_owned())]);
        let table = [
            ("${PORT}", "8080"),
            ("--listen=:${PORT}/x", "--listen=:8080/x"),
            ("$${PORT}", "${PORT}"),
            ("$$$${PORT}", "$${PORT}"),
            ("$$${PORT}", "$8080"),
            ("$PORT", "$PORT"),
            ("a$", "a$"),
            ("${PORT", "${PORT"),
            ("${}", "${}"),
            ("${1X}", "${1X}"),
            ("${NOPE}${PORT}", "${NOPE}8080"),
            ("grün ${PORT}", "grün 8080"),
        ];
        for (text, expected) in table {
            let got = arguments("command", &[text.to_owned()], &environment);
            assert_eq!(got.value, [expected], "{text}");
        }
        let got = arguments("command", &["${NOPE}".to_owned()], &environment);
        assert_eq!(got.unknown, unknown([("command", "NOPE")]));
    }
}
