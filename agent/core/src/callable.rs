//! Where a process finds a service, and how it is told: variables such as `DB_ADDR` and `WEB_URL`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::directory::Protocol;

/// A service as callers on this host reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Callable {
    pub service: Arc<str>,
    /// By name; the first is meant when none is named.
    pub ports: Vec<CallablePort>,
}

/// One port of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallablePort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub address: SocketAddr,
}

impl CallablePort {
    /// `http://127.88.0.5:80`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}://{}", self.protocol.scheme(), self.address)
    }
}

/// `<NAME>_ADDR` and `<NAME>_URL` of each service's first port, and of a service with several ports the same of each, as
/// `<NAME>_<PORT>_ADDR`. Where two mean the same variable, the service of that name has it. `NAVE_*` is never touched.
#[must_use]
pub fn address_variables(services: &[Callable]) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for service in services.iter().filter(|service| service.ports.len() > 1) {
        for port in &service.ports {
            insert(&mut variables, &format!("{}_{}", service.service, port.name), port);
        }
    }
    for service in services {
        if let Some(first) = service.ports.first() {
            insert(&mut variables, &service.service, first);
        }
    }
    variables.retain(|name, _| !name.starts_with("NAVE_"));
    variables
}

fn insert(variables: &mut BTreeMap<String, String>, name: &str, port: &CallablePort) {
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
    variables.insert(format!("{name}_ADDR"), port.address.to_string());
    variables.insert(format!("{name}_URL"), port.url());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn callable(service: &str, ports: &[(&str, Protocol, u16)]) -> Callable {
        let port = |&(name, protocol, port): &(&str, Protocol, u16)| CallablePort {
            name: name.into(),
            protocol,
            address: SocketAddr::from(([127, 88, 0, 5], port)),
        };
        Callable { service: service.into(), ports: ports.iter().map(port).collect() }
    }

    #[test]
    fn variables_are_exactly_these() {
        let services = [
            callable("db", &[("pg", Protocol::Tcp, 5432)]),
            callable("my-web", &[("admin", Protocol::Grpc, 9000), ("http", Protocol::Http, 80)]),
            callable("nave", &[("http", Protocol::Http, 80)]),
            callable("nothing", &[]),
        ];
        let lines: Vec<String> =
            address_variables(&services).iter().map(|(name, value)| format!("{name}={value}")).collect();
        let expected = [
            "DB_ADDR=127.88.0.5:5432",
            "DB_URL=tcp://127.88.0.5:5432",
            "MY_WEB_ADDR=127.88.0.5:9000",
            "MY_WEB_ADMIN_ADDR=127.88.0.5:9000",
            "MY_WEB_ADMIN_URL=grpc://127.88.0.5:9000",
            "MY_WEB_HTTP_ADDR=127.88.0.5:80",
            "MY_WEB_HTTP_URL=http://127.88.0.5:80",
            "MY_WEB_URL=grpc://127.88.0.5:9000",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn a_service_has_its_own_name() {
        let services = [
            callable("web", &[("x", Protocol::Http, 81), ("y", Protocol::Http, 82)]),
            callable("web-x", &[("http", Protocol::Http, 80)]),
        ];
        assert_eq!(address_variables(&services)["WEB_X_ADDR"], "127.88.0.5:80");
    }
}
