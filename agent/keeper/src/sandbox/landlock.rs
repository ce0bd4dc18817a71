//! Landlock: whatever user a program becomes, it reaches only these paths.

use std::io;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};
use nave_proto::pb;

use crate::stub::{Failure, Step};

/// The file rights of Linux 6.2; a newer kernel's further rights are about devices and sockets.
const RIGHTS: ABI = ABI::V3;
/// A program needs these to run at all. Whether it may read one of their files, its user decides as ever.
const SYSTEM: [&str; 13] = [
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/proc", "/sys", "/run",
    "/nix",
];
const SYSTEM_WRITABLE: [&str; 1] = ["/dev"];

/// Restricts this process and all that come from it, for good.
pub(crate) fn restrict_files(sandbox: &pb::Sandbox) -> Result<(), Failure> {
    if !sandbox.landlock {
        return Ok(());
    }
    if !super::has_landlock() {
        return Err(Failure::new(Step::Landlock, nix::errno::Errno::EOPNOTSUPP, "this kernel has it not"));
    }
    let given = |paths: &[String]| paths.iter().map(|path| (path.clone(), true)).collect::<Vec<_>>();
    let system = |paths: &[&str]| paths.iter().map(|path| ((*path).to_owned(), false)).collect::<Vec<_>>();
    let read = [given(&sandbox.read), system(&SYSTEM)].concat();
    let write = [given(&sandbox.write), system(&SYSTEM_WRITABLE)].concat();
    let failed = |error: RulesetError| Failure::new(Step::Landlock, io::ErrorKind::Other, error.to_string());
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(RIGHTS))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for (paths, rights) in [(read, AccessFs::from_read(RIGHTS)), (write, AccessFs::from_all(RIGHTS))] {
        for (path, required) in paths {
            match PathFd::new(&path) {
                Ok(open) => rules = rules.add_rule(PathBeneath::new(open, rights)).map_err(failed)?,
                Err(_) if !required => {}
                Err(_) => return Err(Failure::new(Step::Landlock, nix::errno::Errno::ENOENT, path)),
            }
        }
    }
    match rules.restrict_self().map_err(failed)?.ruleset {
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
        RulesetStatus::NotEnforced => {
            Err(Failure::new(Step::Landlock, nix::errno::Errno::EOPNOTSUPP, "the kernel did not enforce it"))
        }
    }
}
