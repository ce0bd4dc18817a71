//! What a caller is told when a call does not do what it should: the canonical gRPC code, `google.rpc` details for
//! programs (`ErrorInfo` with a reason, `BadRequest` with fields), and a sentence for people that says what
//! happened, why, and what to do next. Every service of the API makes its refusals here.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::manifest::{MANIFEST_BYTES_MAX, Violation};
use nave_proto::pb;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::raft::{ProposeError, ReadError};

/// The domain of our `ErrorInfo` reasons.
const DOMAIN: &str = "nave.v1";

/// How many members answer this one, for the sentence about an absent quorum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    pub(crate) members: usize,
    pub(crate) unreachable: usize,
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unreachable {
            0 => write!(f, "the members have no leader at the moment"),
            unreachable => write!(f, "{unreachable} of {} members cannot be reached", self.members),
        }
    }
}

fn with_reason(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

/// A command that was not acknowledged.
pub(crate) fn propose(error: &ProposeError, reach: Reach) -> Status {
    match error {
        ProposeError::Unavailable { .. } => with_reason(
            Code::Unavailable,
            "NO_LEADER",
            format!("{reach}; nothing was changed; try again, or see `nave cluster status`"),
        ),
        ProposeError::Unknown => unknown(reach),
        ProposeError::Overloaded => with_reason(
            Code::ResourceExhausted,
            "OVERLOADED",
            "the hub has too many changes under way; nothing was changed; try again in a moment",
        ),
        ProposeError::TooLarge => with_reason(
            Code::InvalidArgument,
            "TOO_LARGE",
            "the change is larger than the log takes; nothing was changed; split it",
        ),
        ProposeError::Refused { why } => {
            with_reason(Code::ResourceExhausted, "REFUSED", format!("{why}; nothing was changed"))
        }
        ProposeError::Stopped => stopping(),
    }
}

/// It may or may not have taken effect, and the caller has to know that.
pub(crate) fn unknown(reach: Reach) -> Status {
    let because = match reach.unreachable {
        0 => "the hub did not answer in time".to_owned(),
        _ => reach.to_string(),
    };
    with_reason(
        Code::DeadlineExceeded,
        "OUTCOME_UNKNOWN",
        format!("{because}; the change may or may not have been made; look before you repeat it"),
    )
}

/// A read that had to be linearizable and could not be.
pub(crate) fn read(error: &ReadError, reach: Reach) -> Status {
    match error {
        ReadError::Stopped => stopping(),
        ReadError::Unavailable { .. } | ReadError::Timeout => with_reason(
            Code::Unavailable,
            "NO_LEADER",
            format!(
                "{reach}, so this member cannot prove its answer to be the newest; ask without linearizable"
            ),
        ),
    }
}

/// This member is on its way down.
pub(crate) fn stopping() -> Status {
    with_reason(Code::Unavailable, "STOPPING", "this member is stopping; ask another one")
}

/// Nothing has been committed yet in this cluster, which passes by itself.
pub(crate) fn not_begun() -> Status {
    with_reason(
        Code::Unavailable,
        "NOT_BEGUN",
        "the cluster is only just beginning; nothing was changed; try again in a moment",
    )
}

/// A committed command that could not take effect.
pub(crate) fn rejected(rejected: &pb::Rejected) -> Status {
    let message = rejected.message.clone();
    match rejected.code() {
        pb::RejectedCode::NotFound => with_reason(Code::NotFound, "NOT_FOUND", message),
        pb::RejectedCode::NotBegun => not_begun(),
        pb::RejectedCode::Conflict => with_reason(Code::FailedPrecondition, "CONFLICT", message),
        pb::RejectedCode::Invalid => with_reason(Code::InvalidArgument, "INVALID", message),
        pb::RejectedCode::Expired => with_reason(Code::PermissionDenied, "TOKEN_EXPIRED", message),
        pb::RejectedCode::Forgotten => with_reason(Code::DeadlineExceeded, "OUTCOME_UNKNOWN", message),
        pb::RejectedCode::Superseded => with_reason(Code::Aborted, "SUPERSEDED", message),
        pb::RejectedCode::Exhausted => with_reason(Code::ResourceExhausted, "EXHAUSTED", message),
        pb::RejectedCode::Unspecified => with_reason(Code::Internal, "REJECTED", message),
    }
}

/// A manifest with impossible values, each named by its path.
pub(crate) fn invalid_manifest(violations: &[Violation]) -> Status {
    let mut details = ErrorDetails::with_error_info("INVALID_MANIFEST", DOMAIN, HashMap::new());
    let mut message = "the manifest is not valid".to_owned();
    for (index, Violation { path, message: what, .. }) in violations.iter().enumerate() {
        details.add_bad_request_violation(path.clone(), what.clone());
        message.push_str(if index == 0 { ": " } else { "; " });
        message.push_str(path);
        message.push_str(": ");
        message.push_str(what);
    }
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// A field of the request itself.
pub(crate) fn invalid_field(field: &str, what: &str) -> Status {
    let mut details = ErrorDetails::with_error_info("INVALID_FIELD", DOMAIN, HashMap::new());
    details.add_bad_request_violation(field, what);
    Status::with_error_details(Code::InvalidArgument, format!("{field}: {what}"), details)
}

/// A manifest above the limit, refused before it is looked at.
pub(crate) fn manifest_too_large(bytes: usize) -> Status {
    invalid_field(
        "manifest",
        &format!(
            "is {bytes} bytes, at most {MANIFEST_BYTES_MAX} are accepted; keep data in files on the hosts and name them"
        ),
    )
}

/// No such service.
pub(crate) fn no_service(name: &str) -> Status {
    with_reason(
        Code::NotFound,
        "SERVICE_NOT_FOUND",
        format!("there is no service {name:?}; `nave services` lists them"),
    )
}

/// An instance that the hub does not know, and no host that answered either.
pub(crate) fn no_output(service: &str, instance: InstanceId) -> Status {
    with_reason(
        Code::NotFound,
        "INSTANCE_NOT_FOUND",
        format!(
            "the hub knows no instance {instance} of {service}, and no host has such output of it; \
             `nave ps {service}` lists those there are"
        ),
    )
}

/// An instance that is another service's.
pub(crate) fn of_another_service(instance: InstanceId, service: &str) -> Status {
    with_reason(
        Code::NotFound,
        "INSTANCE_NOT_FOUND",
        format!("{instance} is an instance of {service}: `nave logs {service} --instance {instance}`"),
    )
}

/// No such host.
pub(crate) fn no_host(name: &str) -> Status {
    with_reason(
        Code::NotFound,
        "HOST_NOT_FOUND",
        format!("there is no host {name:?}; `nave hosts` lists them"),
    )
}

/// A join token that opens nothing; which part is wrong is not told to a stranger.
pub(crate) fn bad_token() -> Status {
    with_reason(
        Code::PermissionDenied,
        "TOKEN_INVALID",
        "the join token is not valid here, or has expired, or was used up or revoked; \
         make a new one with `nave token create`",
    )
}

/// An agent whose host the hub does not know, or knows by another key.
pub(crate) fn not_registered(what: &str) -> Status {
    with_reason(
        Code::PermissionDenied,
        "HOST_NOT_REGISTERED",
        format!("{what}; move the agent's data directory away and join again with a token"),
    )
}

/// An agent whose host was given up for good: what it ran is others' now.
pub(crate) fn forgotten(host: HostId) -> Status {
    with_reason(
        Code::PermissionDenied,
        nave_proto::words::HOST_FORGOTTEN,
        format!(
            "{host} was given up for good with `nave hosts forget`; to use this machine again, stop the agent, remove \
             its data directory, and join again with a new token"
        ),
    )
}

/// A second machine with one identity.
pub(crate) fn cloned(host: HostId) -> Status {
    with_reason(
        Code::PermissionDenied,
        nave_proto::words::HOST_CLONED,
        format!(
            "another machine acts for {host} with the same identity: a data directory was copied; stop one of the two, \
             remove its data directory, and let it join again with a token of its own"
        ),
    )
}

/// Another place acted for the host until a moment ago.
pub(crate) fn held(host: HostId, after: Duration) -> Status {
    with_reason(
        Code::Unavailable,
        "HOST_HELD",
        format!(
            "the agent of {host} was heard from another boot or directory a moment ago; if it stays silent, this one may \
             take its place in {} s",
            after.as_secs() + 1
        ),
    )
}

/// A precondition of a call about the hub itself.
pub(crate) fn failed_precondition(reason: &str, message: impl Into<String>) -> Status {
    with_reason(Code::FailedPrecondition, reason, message)
}

/// A call that a member made for a caller and that went wrong.
pub(crate) fn unavailable(reason: &str, message: impl Into<String>) -> Status {
    with_reason(Code::Unavailable, reason, message)
}

/// What should not happen: said, never hidden.
pub(crate) fn internal(message: impl Into<String>) -> Status {
    with_reason(Code::Internal, "INTERNAL", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GONE: Reach = Reach { members: 3, unreachable: 2 };

    fn reason(status: &Status) -> String {
        status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
    }

    #[test]
    fn each_way_a_write_can_fail_has_its_code_and_reason() {
        let table = [
            (
                ProposeError::Unavailable { leader: None },
                Code::Unavailable,
                "NO_LEADER",
                "nothing was changed",
            ),
            (ProposeError::Unknown, Code::DeadlineExceeded, "OUTCOME_UNKNOWN", "may or may not"),
            (ProposeError::Overloaded, Code::ResourceExhausted, "OVERLOADED", "nothing was changed"),
            (ProposeError::TooLarge, Code::InvalidArgument, "TOO_LARGE", "nothing was changed"),
            (
                ProposeError::Refused { why: "the disk is nearly full".to_owned() },
                Code::ResourceExhausted,
                "REFUSED",
                "the disk is nearly full; nothing was changed",
            ),
            (ProposeError::Stopped, Code::Unavailable, "STOPPING", "ask another"),
        ];
        for (error, code, expected, text) in table {
            let status = propose(&error, GONE);
            assert_eq!((status.code(), reason(&status).as_str()), (code, expected), "{error:?}");
            assert!(status.message().contains(text), "{}", status.message());
        }
        let status = propose(&ProposeError::Unavailable { leader: None }, GONE);
        assert!(status.message().starts_with("2 of 3 members cannot be reached; nothing was changed"));
    }

    #[test]
    fn each_rejection_has_its_code() {
        let table = [
            (pb::RejectedCode::NotFound, Code::NotFound, "NOT_FOUND"),
            (pb::RejectedCode::Conflict, Code::FailedPrecondition, "CONFLICT"),
            (pb::RejectedCode::Invalid, Code::InvalidArgument, "INVALID"),
            (pb::RejectedCode::Expired, Code::PermissionDenied, "TOKEN_EXPIRED"),
            (pb::RejectedCode::Forgotten, Code::DeadlineExceeded, "OUTCOME_UNKNOWN"),
            (pb::RejectedCode::Superseded, Code::Aborted, "SUPERSEDED"),
            (pb::RejectedCode::Exhausted, Code::ResourceExhausted, "EXHAUSTED"),
            (pb::RejectedCode::Unspecified, Code::Internal, "REJECTED"),
        ];
        for (given, code, expected) in table {
            let status = rejected(&pb::Rejected { code: given.into(), message: "why".to_owned() });
            assert_eq!((status.code(), reason(&status).as_str(), status.message()), (code, expected, "why"));
        }
        let early =
            rejected(&pb::Rejected { code: pb::RejectedCode::NotBegun.into(), message: String::new() });
        assert_eq!((early.code(), reason(&early).as_str()), (Code::Unavailable, "NOT_BEGUN"));
    }

    #[test]
    fn a_bad_manifest_names_its_fields() {
        let violation =
            |path: &str, message: &str| Violation { path: path.to_owned(), message: message.to_owned() };
        let status = invalid_manifest(&[violation("count", "is too large"), violation("name", "is empty")]);
        assert_eq!(status.message(), "the manifest is not valid: count: is too large; name: is empty");
        let details = status.get_error_details();
        let fields: Vec<_> = details
            .bad_request()
            .unwrap()
            .field_violations
            .iter()
            .map(|field| field.field.as_str())
            .collect();
        assert_eq!(fields, ["count", "name"]);
    }
}
