//! What a verb returns when it could not do what was asked: words for the person, an exit code for the script.
//! The one place where a gRPC status becomes both. Everything else in this crate builds a [`Failure`] or lets
//! `?` make one; `main` prints it once.

use std::fmt;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// The exit codes of DESIGN 5; 0 is success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Refused or failed.
    Refused = 1,
    /// Wrong usage, or an invalid manifest.
    Usage = 2,
    /// The cluster was not reachable, or the outcome is unknown.
    Unknown = 3,
}

/// Why a verb ended without success.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    message: String,
    /// Lines of detail, printed indented below the message.
    details: Vec<String>,
    /// What to do next.
    next: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), details: Vec::new(), next: None }
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(Exit::Refused, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    #[must_use]
    pub(crate) fn detail(mut self, line: impl Into<String>) -> Self {
        self.details.push(line.into());
        self
    }

    #[must_use]
    pub(crate) fn details(mut self, lines: impl IntoIterator<Item = String>) -> Self {
        self.details.extend(lines);
        self
    }

    #[must_use]
    pub(crate) fn next(mut self, what: impl Into<String>) -> Self {
        self.next = Some(what.into());
        self
    }

    #[must_use]
    pub(crate) fn exiting(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// With what it is about in front.
    #[must_use]
    pub(crate) fn of(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// A refusal by the hub, in its words.
    pub(crate) fn from_status(status: &Status) -> Self {
        let mut failure = Self::new(exit_of(status), message_of(status));
        let said = failure.message.clone();
        if let Some(bad) = status.get_details_bad_request() {
            let unsaid =
                bad.field_violations.iter().filter(|violation| !said.contains(&violation.description));
            failure = failure.details(unsaid.map(|violation| match violation.field.as_str() {
                "" => violation.description.clone(),
                field => format!("{field}: {}", violation.description),
            }));
        }
        if let Some(failed) = status.get_details_precondition_failure() {
            let lines = failed.violations.iter().map(|violation| violation.description.clone());
            failure = failure.details(lines.filter(|line| !said.contains(line.as_str())));
        }
        if let Some(help) = status.get_details_help()
            && let Some(link) = help.links.first()
        {
            failure.next = Some(link.description.clone());
        }
        failure
    }
}

/// The hub's reason for a request that is well formed and does not fit what there is, such as a cycle of needs.
const DOES_NOT_FIT: &str = "INVALID";

/// DESIGN 5: what was refused is 1, what was wrong in the request is 2, what nobody knows is 3.
fn exit_of(status: &Status) -> Exit {
    match status.code() {
        Code::InvalidArgument
            if status.get_details_error_info().is_some_and(|info| info.reason == DOES_NOT_FIT) =>
        {
            Exit::Refused
        }
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => Exit::Unknown,
        Code::Ok
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss
        | Code::Unauthenticated => Exit::Refused,
    }
}

fn message_of(status: &Status) -> String {
    match (status.code(), status.message()) {
        (Code::Unimplemented, "") => {
            "this member does not know the request: it runs an older program".to_owned()
        }
        (code, "") => format!("the hub answered: {}", code.description().to_lowercase()),
        (Code::Internal | Code::Unknown | Code::DataLoss, message) => format!("the hub failed: {message}"),
        (_, message) => message.to_owned(),
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for line in &self.details {
            write!(f, "\n  {}", line.replace('\n', "\n  "))?;
        }
        if let Some(next) = &self.next {
            write!(f, "\nnext: {next}")?;
        }
        Ok(())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::refused(format!("{error:#}").trim_end())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::refused(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn codes_map_to_the_exit_codes_of_the_contract() {
        for (code, exit) in [
            (Code::NotFound, Exit::Refused),
            (Code::FailedPrecondition, Exit::Refused),
            (Code::PermissionDenied, Exit::Refused),
            (Code::ResourceExhausted, Exit::Refused),
            (Code::InvalidArgument, Exit::Usage),
            (Code::Unavailable, Exit::Unknown),
            (Code::DeadlineExceeded, Exit::Unknown),
        ] {
            assert_eq!(exit_of(&Status::new(code, "")), exit, "{code:?}");
        }
    }

    #[test]
    fn a_manifest_that_does_not_fit_what_there_is_is_refused_rather_than_invalid() {
        let details = ErrorDetails::with_error_info("INVALID", "nave.v1", std::collections::HashMap::new());
        let status = Status::with_error_details(Code::InvalidArgument, "a and b need each other", details);
        assert_eq!(exit_of(&status), Exit::Refused);
    }

    #[test]
    fn violations_become_indented_lines() {
        let details = ErrorDetails::with_bad_request_violation("ports.http", "service_port is required");
        let status = Status::with_error_details(Code::InvalidArgument, "the manifest is invalid", details);
        let failure = Failure::from_status(&status);
        assert_eq!(failure.exit, Exit::Usage);
        assert_eq!(failure.to_string(), "the manifest is invalid\n  ports.http: service_port is required");
    }

    #[test]
    fn the_next_step_comes_last() {
        let failure =
            Failure::refused("no service \"wbe\"").detail("did you mean web?").next("`nave services`");
        assert_eq!(failure.to_string(), "no service \"wbe\"\n  did you mean web?\nnext: `nave services`");
    }
}
