//! Facts about the machine that the harness stands on: free ports, privileges.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// Ports per cluster: members at +0.., agents at +10.., metrics at +20.. and +30...
pub const PORTS_PER_CLUSTER: u16 = 40;

/// A block of `PORTS_PER_CLUSTER` loopback ports that nobody listens on, below the ephemeral range (32768..)
/// and above the range of instance ports (20000-32000 is theirs, so 10000-19999 is ours).
pub fn free_ports() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let seed = u16::try_from(std::process::id() % 240).expect("below 240");
    loop {
        let block = (seed + NEXT.fetch_add(1, Ordering::Relaxed)) % 240;
        let base = 10_000 + block * PORTS_PER_CLUSTER;
        if (base..base + PORTS_PER_CLUSTER).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return base;
        }
    }
}

/// Whether the test may mount, make cgroups and change users.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
