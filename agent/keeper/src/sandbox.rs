//! What the exec-stub closes off before exec, each step with its own reason when it fails: mounts of its own,
//! capabilities, Landlock, seccomp. Nothing is left out silently: what was asked for and cannot be had ends the start.

mod landlock;
mod mounts;
mod privileges;
mod seccomp;

pub(crate) use self::landlock::restrict_files;
pub(crate) use mounts::{join_mounts, make_mounts};
pub(crate) use privileges::{bound_capabilities, take_capabilities};
pub(crate) use seccomp::restrict_calls;

/// Whether this kernel has Landlock, switched on.
#[must_use]
pub fn has_landlock() -> bool {
    crate::sys::landlock_version().is_some()
}
