//! Who holds a port: for the sentence that says why an instance cannot have it. Reads /proc, and only when there is
//! something to explain.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

/// Whether an instance could listen there now: also false when somebody listens on all addresses.
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// `process 123 (nginx)`, or "another program" when that cannot be found out.
pub(crate) fn holder_or_other(port: u16) -> String {
    holder(port).unwrap_or_else(|| "another program".to_owned())
}

/// `process 123 (nginx)`, when it can be found out. It costs a walk through all processes.
pub(crate) fn holder(port: u16) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .find_map(|table| listening_inode(&std::fs::read_to_string(table).ok()?, port))?;
    let wanted = format!("socket:[{inode}]");
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if holds(&process.path().join("fd"), &wanted) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim()));
        }
    }
    None
}

fn holds(descriptors: &Path, wanted: &str) -> bool {
    let entries = std::fs::read_dir(descriptors).into_iter().flatten().flatten();
    entries
        .into_iter()
        .any(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == wanted))
}

/// `  0: 0100007F:1F90 00000000:0000 0A … uid timeout inode`, state 0A being LISTEN.
fn listening_inode(table: &str, port: u16) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let local = fields.get(1)?.rsplit_once(':')?.1;
        let listens = *fields.get(3)? == "0A" && u16::from_str_radix(local, 16) == Ok(port);
        listens.then(|| fields.get(9)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listener_is_found_in_the_kernels_table() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 0100007F:C001 01 00000000:00000000 00:00000000 00000000     0        0 111 1 0
   1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1 0
";
        assert_eq!(listening_inode(table, 8080), Some(222));
        assert_eq!(listening_inode(table, 8081), None);
    }

    #[test]
    fn a_port_that_is_taken_names_its_holder() {
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!is_free(port));
        let holder = holder(port).unwrap();
        assert!(holder.starts_with(&format!("process {} (", std::process::id())), "{holder}");
        drop(listener);
        assert!(is_free(port));
    }
}
