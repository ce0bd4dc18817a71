//! Ids as newtypes, each with the one form people see (`h-3`, `i-42`, `m-1`) and its parser.
//! The hub allots them in order and never again; on the wire they are plain numbers.

use std::fmt;
use std::str::FromStr;

/// A string that is not an id of the kind asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a {kind} id, which looks like {example}")]
pub struct ParseIdError {
    kind: &'static str,
    example: &'static str,
    given: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal, $example:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(s: &str) -> Result<Self, ParseIdError> {
                s.strip_prefix($prefix)
                    .and_then(|number| number.parse().ok())
                    .map(Self)
                    .ok_or_else(|| ParseIdError { kind: $kind, example: $example, given: s.to_owned() })
            }
        }
    };
}

id!(
    /// A host, allotted when its agent enrols; in its certificate, its cgroup names and its runtime directory.
    HostId, "h-", "host", "h-3"
);
id!(
    /// One desired copy of a service version; kept when it is placed again (its epoch rises).
    InstanceId, "i-", "instance", "i-42"
);
id!(
    /// A hub member; its openraft node id. A replaced member gets a new one.
    MemberId, "m-", "member", "m-1"
);

/// A cluster: 64 random bits, sixteen hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub u64);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for ClusterId {
    type Err = ParseIdError;
    fn from_str(s: &str) -> Result<Self, ParseIdError> {
        let wrong = || ParseIdError { kind: "cluster", example: "00f1e2d3c4b5a697", given: s.to_owned() };
        if s.len() != 16 {
            return Err(wrong());
        }
        u64::from_str_radix(s, 16).map(Self).map_err(|_| wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_their_own_text() {
        assert_eq!("h-3".parse(), Ok(HostId(3)));
        assert_eq!(InstanceId(42).to_string().parse(), Ok(InstanceId(42)));
        assert_eq!(ClusterId(7).to_string().parse(), Ok(ClusterId(7)));
    }

    #[test]
    fn an_id_of_another_kind_is_refused() {
        let error = "i-3".parse::<HostId>().unwrap_err();
        assert_eq!(error.to_string(), "\"i-3\" is not a host id, which looks like h-3");
        assert!("h-".parse::<HostId>().is_err_and(|e| e.given == "h-"));
    }
}
