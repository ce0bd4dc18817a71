//! Capabilities: those that the manifest names, in every set; no other, in none, and none to be had again.

use nave_proto::pb;

use crate::stub::{Failure, Step};
use crate::sys;

/// Before the user is changed: takes away for good what may never be had, and says that the change of user shall not
/// take the rest.
pub(crate) fn bound_capabilities(sandbox: &pb::Sandbox) -> Result<(), Failure> {
    if !sandbox.bound_capabilities {
        return Ok(());
    }
    let failed = |error| Failure::new(Step::Capabilities, error, "");
    for number in 0..=sys::CAPABILITY_MAX {
        if !sandbox.capabilities.contains(&number) {
            sys::drop_bounding(number).map_err(failed)?;
        }
    }
    keep_capabilities(sandbox)
}

/// So that those asked for survive the change of user.
fn keep_capabilities(sandbox: &pb::Sandbox) -> Result<(), Failure> {
    if sandbox.capabilities.is_empty() {
        return Ok(());
    }
    nix::sys::prctl::set_keepcaps(true).map_err(|error| Failure::new(Step::Capabilities, error, ""))
}

/// After the user is changed: exactly those asked for, passed on to the program.
pub(crate) fn take_capabilities(sandbox: &pb::Sandbox) -> Result<(), Failure> {
    let failed = |error| Failure::new(Step::Capabilities, error, "");
    sys::clear_ambient().map_err(failed)?;
    if !sandbox.bound_capabilities {
        return Ok(());
    }
    let wanted = sandbox.capabilities.iter().fold(0_u64, |set, number| set | 1 << number.min(&63));
    sys::set_capabilities(wanted).map_err(failed)?;
    sandbox.capabilities.iter().try_for_each(|number| sys::raise_ambient(*number).map_err(failed))
}
