//! Keys of the log database. They order as (group, index), and never change.

/// Column family of the entries.
pub(super) const LOG: &str = "log";
/// Column family of votes and marks.
pub(super) const META: &str = "meta";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Meta {
    Vote = 1,
    Purged = 2,
    Committed = 3,
}

pub(super) fn entry(group: u32, index: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&group.to_be_bytes());
    key[4..].copy_from_slice(&index.to_be_bytes());
    key
}

/// The index in an entry's key, when the key is of `group`.
pub(super) fn index(group: u32, key: &[u8]) -> Option<u64> {
    let (prefix, index) = key.split_first_chunk::<4>()?;
    (u32::from_be_bytes(*prefix) == group).then_some(u64::from_be_bytes(index.try_into().ok()?))
}

pub(super) fn meta(group: u32, kind: Meta) -> [u8; 5] {
    let mut key = [0; 5];
    key[..4].copy_from_slice(&group.to_be_bytes());
    key[4] = kind as u8;
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_as_group_and_index() {
        let ids = [(0, 0), (0, 1), (0, 255), (0, 256), (0, u64::MAX), (1, 0), (256, 3), (u32::MAX, 1)];
        for pair in ids.windows(2) {
            assert!(entry(pair[0].0, pair[0].1) < entry(pair[1].0, pair[1].1), "{pair:?}");
        }
        for (group, at) in ids {
            assert_eq!(index(group, &entry(group, at)), Some(at));
            assert_eq!(index(group ^ 1, &entry(group, at)), None);
        }
    }

    #[test]
    fn marks_of_a_group_differ() {
        assert_ne!(meta(3, Meta::Vote), meta(3, Meta::Purged));
        assert_ne!(meta(3, Meta::Vote), meta(4, Meta::Vote));
        assert_eq!(index(3, &meta(3, Meta::Vote)), None);
    }
}
