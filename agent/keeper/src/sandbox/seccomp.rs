//! Presets of system calls that a service is refused, with EPERM, as an unprivileged user would be.
//!
//! Lists of what is refused, not of what is allowed: a service that met a new call of its C library would else end on
//! the day of an upgrade. What they leave out is what no ordinary server needs: administering the machine, looking
//! into other processes, and the doors around the filter itself (io_uring, the x32 numbers).

use std::collections::BTreeMap;
use std::io;

use nave_proto::pb;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter, sock_filter,
};

use crate::stub::{Failure, Step};

const REFUSED: &[libc::c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];
#[cfg(target_arch = "x86_64")]
const REFUSED_HERE: &[libc::c_long] = &[
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kexec_file_load,
    libc::SYS_modify_ldt,
    libc::SYS_sysfs,
    libc::SYS_uselib,
    libc::SYS_ustat,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[libc::c_long] = &[];

/// The last step before exec, since what it refuses might be needed by any other.
pub(crate) fn restrict_calls(sandbox: &pb::Sandbox) -> Result<(), Failure> {
    let offline = match sandbox.seccomp() {
        pb::SeccompPreset::Unspecified => return Ok(()),
        pb::SeccompPreset::Standard => false,
        pb::SeccompPreset::Offline => true,
    };
    for program in programs(offline)? {
        apply_filter(&program).map_err(failed)?;
    }
    Ok(())
}

fn failed(error: impl ToString) -> Failure {
    Failure::new(Step::Seccomp, io::ErrorKind::InvalidInput, error.to_string())
}

/// The filters, each with its own answer.
fn programs(offline: bool) -> Result<Vec<BpfProgram>, Failure> {
    let mut refused: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().chain(REFUSED_HERE).map(|number| (*number, Vec::new())).collect();
    let flag = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
    let new_user = condition(0, SeccompCmpOp::MaskedEq(flag), flag)?;
    refused.insert(libc::SYS_clone, vec![new_user]);
    if offline {
        let local = u64::from(libc::AF_UNIX.unsigned_abs());
        refused.insert(libc::SYS_socket, vec![condition(0, SeccompCmpOp::Ne, local)?]);
    }
    // Its flags are in memory, where no filter can look. The C library takes this answer and uses clone.
    let without_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok(vec![filter(refused, libc::EPERM)?, filter(without_clone3, libc::ENOSYS)?])
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, Failure> {
    let condition =
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).map_err(failed)?;
    SeccompRule::new(vec![condition]).map_err(failed)
}

fn filter(refused: BTreeMap<i64, Vec<SeccompRule>>, errno: i32) -> Result<BpfProgram, Failure> {
    let arch = std::env::consts::ARCH.try_into().map_err(failed)?;
    let answer = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new(refused, SeccompAction::Allow, answer, arch).map_err(failed)?;
    let program: BpfProgram = filter.try_into().map_err(failed)?;
    Ok(refuse_x32().into_iter().chain(program).collect())
}

/// On x86-64 every call has a second number, which the lists above do not have.
fn refuse_x32() -> Vec<sock_filter> {
    if !cfg!(target_arch = "x86_64") {
        return Vec::new();
    }
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const X32: u32 = 0x4000_0000;
    const ERRNO_ENOSYS: u32 = 0x0005_0000 | 38;
    vec![
        sock_filter { code: LOAD, jt: 0, jf: 0, k: 0 },
        sock_filter { code: JUMP_IF_AT_LEAST, jt: 0, jf: 1, k: X32 },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: ERRNO_ENOSYS },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_presets_compile_for_this_machine() {
        for offline in [false, true] {
            assert_eq!(programs(offline).unwrap().len(), 2);
        }
    }
}
