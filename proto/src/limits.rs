//! Linux's resource limits and capabilities by name and number, the same on x86-64 and arm64.

/// Names of resource limits, each at the place of its number, as in `prlimit` and systemd without the `RLIMIT_`.
pub const RLIMIT_NAMES: &[&str] = &[
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

/// Names of capabilities, each at the place of its number, without the `CAP_`.
const CAPABILITY_NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// 7 for `nofile`.
#[must_use]
pub fn rlimit_number(name: &str) -> Option<u32> {
    let place = RLIMIT_NAMES.iter().position(|known| *known == name)?;
    u32::try_from(place).ok()
}

/// `CAP_NET_BIND_SERVICE` for any way of writing it.
#[must_use]
pub fn capability_name(written: &str) -> String {
    let name = written.to_ascii_uppercase();
    if name.starts_with("CAP_") { name } else { format!("CAP_{name}") }
}

/// 10 for `CAP_NET_BIND_SERVICE`.
#[must_use]
pub fn capability_number(name: &str) -> Option<u32> {
    let place = CAPABILITY_NAMES.iter().position(|known| name.strip_prefix("CAP_") == Some(known))?;
    u32::try_from(place).ok()
}

/// Every name with its `CAP_`, to look for the one that was meant.
pub fn capability_names() -> impl Iterator<Item = String> {
    CAPABILITY_NAMES.iter().map(|name| format!("CAP_{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(rlimit_number("nofile"), Some(7));
        assert_eq!(rlimit_number("rttime"), Some(15));
        assert_eq!(capability_number(&capability_name("net_bind_service")), Some(10));
        assert_eq!(capability_number("CAP_SYS_ADMIN"), Some(21));
        assert_eq!(capability_number("CAP_CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(capability_number("CAP_FLY"), None);
    }
}
