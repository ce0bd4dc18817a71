//! Addresses of single instances: `0.db.nave.internal` leads to the first instance of `db` and to no other, wherever it
//! is, for software whose members must know each other. The hub allots none: the agent takes second halves from the top
//! of the prefix downwards, where the hub's, which rise from 1, come last. They are this host's own and remembered, so
//! that an address that somebody has kept stays right.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// A sanity bound: each has a listening socket for every port.
const SINGLES_MAX: usize = 1024;
/// `127.88.255.254`.
const FIRST: u16 = 0xfffe;

/// By service and ordinal.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Singles(BTreeMap<(String, u32), u16>);

impl Singles {
    /// What was remembered; lines that are none are left out.
    pub(super) fn read(file: &Path) -> Self {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let parse = |line: &str| {
            let mut words = line.split(' ');
            let (service, ordinal, suffix) = (words.next()?, words.next()?, words.next()?);
            Some(((service.to_owned(), ordinal.parse().ok()?), suffix.parse().ok()?))
        };
        Self(text.lines().filter_map(parse).collect())
    }

    pub(super) fn write(&self, file: &Path) -> io::Result<()> {
        let line =
            |((service, ordinal), suffix): (&(String, u32), &u16)| format!("{service} {ordinal} {suffix}\n");
        let new = file.with_extension("new");
        std::fs::write(&new, self.0.iter().map(line).collect::<String>())?;
        std::fs::rename(&new, file)
    }

    pub(super) fn suffix(&self, service: &str, ordinal: u32) -> Option<u16> {
        self.0.get(&(service.to_owned(), ordinal)).copied()
    }

    /// Those of the service that have an address.
    pub(super) fn ordinals(&self, service: &str) -> impl Iterator<Item = u32> {
        let range = (service.to_owned(), 0)..=(service.to_owned(), u32::MAX);
        self.0.range(range).map(|((_, ordinal), _)| *ordinal)
    }

    /// A second half that nobody has; `taken`: those of services. `None`: there are too many.
    pub(super) fn allot(&mut self, service: &str, ordinal: u32, taken: &[u16]) -> Option<u16> {
        if self.0.len() >= SINGLES_MAX {
            return None;
        }
        let is_free = |suffix: &u16| !taken.contains(suffix) && !self.0.values().any(|own| own == suffix);
        let suffix = (1..=FIRST).rev().find(is_free)?;
        self.0.insert((service.to_owned(), ordinal), suffix);
        Some(suffix)
    }

    /// The service is gone. Whether it had any.
    pub(super) fn forget(&mut self, service: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|(of, _), _| of != service);
        self.0.len() < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_own_from_the_top_and_keeps_it() {
        let mut singles = Singles::default();
        assert_eq!(singles.allot("db", 0, &[FIRST - 1]), Some(FIRST));
        assert_eq!(singles.allot("db", 2, &[FIRST - 1]), Some(FIRST - 2), "that one is a service's");
        assert_eq!(singles.allot("db-2", 0, &[]), Some(FIRST - 1));
        assert_eq!(singles.ordinals("db").collect::<Vec<_>>(), [0, 2]);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("singles");
        singles.write(&file).unwrap();
        assert_eq!(Singles::read(&file), singles);
        assert!(singles.forget("db") && !singles.forget("db"));
        assert_eq!(singles.suffix("db-2", 0), Some(FIRST - 1));
        assert_eq!(Singles::read(Path::new("/nowhere")), Singles::default());
    }

    #[test]
    fn there_is_an_end_to_them() {
        let mut singles = Singles::default();
        let given = (0..5000).filter_map(|ordinal| singles.allot("db", ordinal, &[])).count();
        assert_eq!(given, SINGLES_MAX);
    }
}
