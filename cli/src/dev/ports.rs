//! Ports that are taken are named before anything is started, each with what it was wanted for.

use std::net::{Ipv4Addr, TcpListener};

use super::role::Role;
use crate::failure::Failure;

pub(super) fn refuse_taken<'a>(roles: impl Iterator<Item = &'a Role>) -> Result<(), Failure> {
    let wanted = roles.flat_map(|role| role.ports.iter().map(move |port| (*port, role.name.as_str())));
    let taken: Vec<_> = wanted.filter(|(port, _)| !is_free(*port)).collect();
    if taken.is_empty() {
        return Ok(());
    }
    let lines = taken.iter().map(|(port, name)| format!("127.0.0.1:{port}, wanted for {name}"));
    Err(Failure::refused("ports are taken by other programs")
        .details(lines)
        .next("another cluster on this machine needs its own ports and directory: nave dev --port 8400 --data-dir DIR"))
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::role::Kind;

    #[test]
    fn a_taken_port_is_named_with_its_purpose() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let role = Role {
            kind: Kind::Member,
            name: "member-2".into(),
            folder: "/d".into(),
            config: "/d/member.toml".into(),
            ports: vec![port],
        };
        let failure = refuse_taken([&role].into_iter()).unwrap_err().to_string();
        assert!(failure.contains(&format!("127.0.0.1:{port}, wanted for member-2")), "{failure}");
        drop(taken);
        refuse_taken([&role].into_iter()).unwrap();
    }
}
