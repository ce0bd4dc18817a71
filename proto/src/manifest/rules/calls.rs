//! How calls to a port are carried: `[ports.NAME.calls]`.

use std::time::Duration;

use super::{DAY, Rules};
use crate::pb;
use crate::time::format_duration;

const MILLISECOND: Duration = Duration::from_millis(1);
/// More would be no bound.
const NUMBER_MAX: u32 = 1_000_000;
/// A call that failed on so many instances would fail on the next.
const RETRIES_MAX: u32 = 10;
const HEADER_MAX: usize = 64;
/// A shorter one would close connections between two calls of a busy caller.
const IDLE_MIN: Duration = Duration::from_secs(1);

impl Rules {
    pub(super) fn calls(&mut self, port: &str, protocol: pb::Protocol, calls: &pb::Calls) {
        let at = |key| ["ports", port, "calls", key];
        if protocol == pb::Protocol::Tcp {
            for (key, is_set) in [
                ("timeout", calls.timeout.is_some()),
                ("try_timeout", calls.try_timeout.is_some()),
                ("max_requests", calls.max_requests.is_some()),
                ("hash_header", !calls.hash_header.is_empty()),
            ] {
                if is_set {
                    self.at(
                        &at(key),
                        "tcp has connections and no requests; idle_timeout and max_connections are theirs",
                    );
                }
            }
        }
        let whole = self.duration(&at("timeout"), calls.timeout.as_ref(), MILLISECOND, DAY);
        let one = self.duration(&at("try_timeout"), calls.try_timeout.as_ref(), MILLISECOND, DAY);
        if let (Some(whole), Some(one)) = (whole, one)
            && one > whole
        {
            let (one, whole) = (format_duration(one), format_duration(whole));
            self.at(
                &at("try_timeout"),
                format!("{one} is longer than timeout, {whole}, so it would never be felt"),
            );
        }
        self.duration(&at("idle_timeout"), calls.idle_timeout.as_ref(), IDLE_MIN, DAY);
        for (key, number, least) in [
            ("max_connections", calls.max_connections, 1),
            ("max_requests", calls.max_requests, 1),
            ("max_pending", calls.max_pending, 0),
        ] {
            if let Some(number) = number
                && !(least..=NUMBER_MAX).contains(&number)
            {
                self.at(&at(key), format!("must be {least} to {NUMBER_MAX}, not {number}"));
            }
        }
        if let Some(retries) = calls.retries.filter(|retries| *retries > RETRIES_MAX) {
            self.at(&at("retries"), format!("must be at most {RETRIES_MAX}, not {retries}"));
        }
        let header = &calls.hash_header;
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if !header.is_empty() && (header.len() > HEADER_MAX || !header.bytes().all(is_token)) {
            let why = format!(
                "must be the name of a header, such as \"X-User\", of at most {HEADER_MAX} characters"
            );
            self.at(&at("hash_header"), why);
        }
    }
}
