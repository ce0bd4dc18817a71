//! Join tokens: what a new host brings to be let in, `nave-join.<cluster>.<sha256 of CA>.<id>.<secret>`.
//! It pins the cluster's CA, so that the very first connection cannot be to an impostor. The hub keeps the id and a
//! hash of the secret; the secret is shown once.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::ids::ClusterId;

const PREFIX: &str = "nave-join";
const ID_BYTES: usize = 4;
const SECRET_BYTES: usize = 20;
/// Longest id or secret read, in characters.
const PART_MAX: usize = 128;

/// A join token. `Display` is its whole text, secret included; `Debug` keeps the secret to itself.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The cluster that it lets a host into.
    pub cluster: ClusterId,
    /// SHA-256 of the CA's certificate in DER, which the hub must show.
    pub ca_sha256: [u8; 32],
    /// What the hub knows it by; not secret.
    pub id: String,
    /// What proves it.
    pub secret: String,
}

/// Text that is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a join token ({0}); it looks like nave-join.CLUSTER.CA.ID.SECRET, make one with: nave token create"
)]
pub struct ParseTokenError(&'static str);

impl JoinToken {
    /// Random bytes that [`new`](Self::new) wants.
    pub const RANDOM_BYTES: usize = ID_BYTES + SECRET_BYTES;

    /// A new token out of random bytes: 32 bits of id, 160 bits of secret.
    pub fn new(cluster: ClusterId, ca_sha256: [u8; 32], random: [u8; Self::RANDOM_BYTES]) -> Self {
        let (id, secret) = random.split_at(ID_BYTES);
        Self { cluster, ca_sha256, id: hex(id), secret: hex(secret) }
    }

    /// SHA-256 of the secret's text, which is all that the hub keeps of it.
    pub fn secret_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.secret.as_bytes()).into()
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("cluster", &self.cluster)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}.{}.{}.{}.{}", self.cluster, hex(&self.ca_sha256), self.id, self.secret)
    }
}

impl FromStr for JoinToken {
    type Err = ParseTokenError;

    /// White space around it is forgiven, since tokens are copied by hand.
    fn from_str(text: &str) -> Result<Self, ParseTokenError> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [prefix, cluster, ca, id, secret] = parts[..] else {
            return Err(ParseTokenError(if parts.len() < 5 {
                "it is cut short"
            } else {
                "it has too many parts"
            }));
        };
        if prefix != PREFIX {
            return Err(ParseTokenError("it does not begin with nave-join"));
        }
        let cluster = cluster.parse().map_err(|_| ParseTokenError("its cluster id is damaged"))?;
        let ca_sha256 = unhex(ca).ok_or(ParseTokenError("its CA hash is damaged"))?;
        let is_part = |part: &str| {
            (1..=PART_MAX).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_alphanumeric())
        };
        if !is_part(id) || !is_part(secret) {
            return Err(ParseTokenError("its id or its secret is damaged"));
        }
        Ok(Self { cluster, ca_sha256, id: id.to_owned(), secret: secret.to_owned() })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken::new(ClusterId(0xfeed), [0xab; 32], [7; JoinToken::RANDOM_BYTES])
    }

    #[test]
    fn a_token_survives_its_own_text_and_stray_white_space() {
        let text = token().to_string();
        assert_eq!(
            text,
            format!("nave-join.000000000000feed.{}.07070707.{}", "ab".repeat(32), "07".repeat(20))
        );
        assert_eq!(format!(" {text}\n").parse(), Ok(token()));
    }

    #[test]
    fn a_damaged_token_says_what_is_damaged() {
        let text = token().to_string();
        for (damaged, why) in [
            (String::new(), "it is cut short"),
            (text[..40].to_owned(), "it is cut short"),
            (format!("{text}.x"), "it has too many parts"),
            (text.replace("nave-join", "k3s"), "it does not begin with nave-join"),
            (text.replace("feed", "fees"), "its cluster id is damaged"),
            (text.replace("abab", "aba"), "its CA hash is damaged"),
            (text.replace("07070707.", "07.é"), "its id or its secret is damaged"),
        ] {
            assert_eq!(damaged.parse::<JoinToken>(), Err(ParseTokenError(why)), "{damaged}");
        }
    }

    #[test]
    fn a_token_keeps_its_secret_from_logs() {
        let shown = format!("{:?}", token());
        assert!(!shown.contains(&token().secret), "{shown}");
    }
}
