//! Which ports an instance gets. Picked on the host that binds them, from a range outside the kernel's own ephemeral
//! ports, at random, so that a port that was just given back is not handed to another service at once while callers
//! still know it. The shell adds what cannot be known here, by trying to bind, and asks again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use rand::Rng;

/// Instance ports unless the agent's configuration says otherwise.
pub const DEFAULT_RANGE: RangeInclusive<u16> = 20_000..=32_000;

/// Why there is no set of ports.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PickPortsError {
    /// A port the manifest fixes is taken on this host.
    #[error("port {port} ({name}) is taken on this host")]
    Taken { name: String, port: u16 },
    /// The range is used up.
    #[error("no free port in {first}-{last} for {name}")]
    Exhausted { name: String, first: u16, last: u16 },
}

/// A port for each name: the fixed ones as they are, the dynamic ones from `range`, none in `taken`, none twice.
///
/// # Errors
/// A fixed port is taken, or the range is used up.
pub fn pick<R: Rng + ?Sized>(
    rng: &mut R,
    range: RangeInclusive<u16>,
    fixed: &BTreeMap<String, u16>,
    dynamic: &[String],
    taken: &BTreeSet<u16>,
) -> Result<BTreeMap<String, u16>, PickPortsError> {
    let mut taken = taken.clone();
    let mut ports = BTreeMap::new();
    for (name, &port) in fixed {
        if !taken.insert(port) {
            return Err(PickPortsError::Taken { name: name.clone(), port });
        }
        ports.insert(name.clone(), port);
    }
    for name in dynamic {
        let port = pick_one(rng, &range, &taken).ok_or_else(|| PickPortsError::Exhausted {
            name: name.clone(),
            first: *range.start(),
            last: *range.end(),
        })?;
        taken.insert(port);
        ports.insert(name.clone(), port);
    }
    Ok(ports)
}

/// From a random place onwards, once round.
fn pick_one<R: Rng + ?Sized>(rng: &mut R, range: &RangeInclusive<u16>, taken: &BTreeSet<u16>) -> Option<u16> {
    if range.is_empty() {
        return None;
    }
    let from = rng.random_range(range.clone());
    (from..=*range.end()).chain(*range.start()..from).find(|port| !taken.contains(port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn same_seed_same_ports_and_none_twice() {
        let pick = |seed| {
            let rng = &mut StdRng::seed_from_u64(seed);
            pick(rng, DEFAULT_RANGE, &BTreeMap::new(), &names(&["a", "b"]), &BTreeSet::new()).unwrap()
        };
        assert_eq!(pick(7), pick(7));
        for seed in 0..500 {
            let ports = pick(seed);
            assert_ne!(ports["a"], ports["b"]);
            assert!(ports.values().all(|port| DEFAULT_RANGE.contains(port)), "{ports:?}");
        }
    }

    #[test]
    fn the_last_free_port_is_found_and_then_there_is_none() {
        let rng = &mut StdRng::seed_from_u64(1);
        let mut taken: BTreeSet<u16> = (20_000..=20_009).filter(|&port| port != 20_004).collect();
        let none = BTreeMap::new();
        let ports = pick(rng, 20_000..=20_009, &none, &names(&["http"]), &taken).unwrap();
        assert_eq!(ports["http"], 20_004);
        taken.insert(20_004);
        let error = pick(rng, 20_000..=20_009, &none, &names(&["http"]), &taken).unwrap_err();
        assert_eq!(error.to_string(), "no free port in 20000-20009 for http");
    }

    #[test]
    fn fixed_ports_are_kept_or_refused_by_name() {
        let rng = &mut StdRng::seed_from_u64(1);
        let fixed = BTreeMap::from([("http".to_owned(), 8_080)]);
        let ports =
            pick(rng, 20_000..=20_001, &fixed, &names(&["admin"]), &BTreeSet::from([20_000])).unwrap();
        assert_eq!((ports["http"], ports["admin"]), (8_080, 20_001));
        let error = pick(rng, DEFAULT_RANGE, &fixed, &[], &BTreeSet::from([8_080])).unwrap_err();
        assert_eq!(error.to_string(), "port 8080 (http) is taken on this host");
    }
}
