//! `nave url SERVICE [PORT]`: the address that clients on this machine use. Its agent knows it: where that may not listen
//! on the service's own port, or another program has it, callers use another one. Without an answer it is worked out
//! from the service's suffix and the agent's prefix.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use nave_proto::pb;
use pb::agent_service_client::AgentServiceClient;

use crate::args::Url;
use crate::client::{Hub, note_age};
use crate::failure::{Exit, Failure};
use crate::{out, tls};

/// An agent's prefix unless it is told another.
const PREFIX: &str = "127.88";
/// Of an agent that is told nothing else.
const AGENT_PORT: u16 = 7410;
/// The agent of this machine knows at once.
const ASK: Duration = Duration::from_secs(1);
/// A local address answers at once or not at all.
const LOOK: Duration = Duration::from_millis(300);

pub(super) async fn run(args: &Url, hub: &Hub) -> Result<(), Failure> {
    if let Some(agent) = &args.agent {
        return match ask_own(hub, agent, args).await {
            Some(told) => print(&told?.1, args).await,
            None => Err(Failure::new(Exit::Unknown, format!("no agent answers at {agent}"))),
        };
    }
    match ask_hub(args, hub).await {
        Err(failure) if failure.exit == Exit::Unknown => {
            // Its agent knows without a hub.
            for agent in own_agents(&hub.context().addresses) {
                if let Some(told) = ask_own(hub, &agent, args).await {
                    out::note("no hub answers; as this machine's agent knows it");
                    return print(&told?.1, args).await;
                }
            }
            Err(failure)
        }
        outcome => outcome,
    }
}

/// Where this machine's agent listens unless it is told otherwise; with `nave dev` ten ports above a member's.
fn own_agents(members: &[String]) -> Vec<String> {
    let local = members.iter().filter_map(|member| member.parse::<SocketAddr>().ok());
    let beside = local
        .filter(|member| member.ip().is_loopback())
        .filter_map(|member| Some(SocketAddr::new(member.ip(), member.port().checked_add(10)?)));
    let mut all: Vec<String> =
        beside.chain([SocketAddr::from(([127, 0, 0, 1], AGENT_PORT))]).map(|at| at.to_string()).collect();
    all.dedup();
    all
}

/// What an agent says of a service's ports; `None`: it does not answer.
async fn ask_own(hub: &Hub, agent: &str, args: &Url) -> Option<Result<(String, String), Failure>> {
    let credentials = tls::operator(hub.context()).ok()?;
    let mut client = AgentServiceClient::new(tls::own_agent_channel(agent, &credentials));
    let request = pb::GetServiceAddressesRequest { service: args.service.clone() };
    let told = match tokio::time::timeout(ASK, client.get_service_addresses(request)).await.ok()? {
        Ok(told) => told.into_inner(),
        Err(status) if status.code() == tonic::Code::NotFound => {
            return Some(Err(Failure::from_status(&status)));
        }
        Err(_) => return None,
    };
    // As the manifest would say them.
    let port = |(name, protocol): (&String, &i32)| {
        let service_port = told.addresses.get(name)?.parse::<SocketAddr>().ok()?.port();
        Some((
            name.clone(),
            pb::Port { protocol: *protocol, service_port: service_port.into(), ..Default::default() },
        ))
    };
    let ports = told.protocols.iter().filter_map(port).collect();
    let manifest = pb::Manifest { name: args.service.clone(), ports, ..Default::default() };
    Some(choose(&manifest, args.port.as_deref()).and_then(|(name, port)| {
        let address = told.addresses.get(name).and_then(|address| address.parse().ok());
        let address =
            address.ok_or_else(|| Failure::refused(format!("{} has no address yet", args.service)))?;
        Ok((name.to_owned(), text(port, address)))
    }))
}

async fn ask_hub(args: &Url, hub: &Hub) -> Result<(), Failure> {
    let request = pb::GetServiceRequest { name: args.service.clone(), linearizable: false };
    let got = hub
        .read_status(|mut member| {
            let request = request.clone();
            async move { member.services.get_service(request).await }
        })
        .await?;
    let got = match got {
        Ok(got) => got,
        Err(status) => return Err(super::about_service(hub, &args.service, &status).await),
    };
    note_age(got.freshness.as_ref());
    let service = got.service.unwrap_or_default();
    let manifest = service.manifest.clone().unwrap_or_default();
    let (name, port) = choose(&manifest, args.port.as_deref())?;
    let hosts = hub
        .read(|mut member| async move { member.hosts.list_hosts(pb::ListHostsRequest::default()).await })
        .await?;
    let own = own_host(&hosts.hosts, &this_host());
    let told = match own {
        Some(host) => ask(hub, host, &args.service, name).await,
        None => None,
    };
    let worked_out = || {
        let number = u16::try_from(port.service_port).ok()?;
        Some(SocketAddr::from((address(prefix(own), service.address_suffix)?, number)))
    };
    let Some(address) = told.or_else(worked_out) else {
        let what = format!("{} has no address yet: it comes with the first instance", args.service);
        return Err(Failure::refused(what).next(format!("nave scale {} 1", args.service)));
    };
    print(&text(port, address), args).await
}

/// Says it, and whether anything is there.
async fn print(url: &str, args: &Url) -> Result<(), Failure> {
    out::line(url);
    let address = url.rsplit('/').next().unwrap_or_default();
    let dialled = tokio::net::TcpStream::connect(address);
    if !matches!(tokio::time::timeout(LOOK, dialled).await, Ok(Ok(_))) {
        out::note(format_args!(
            "nothing answers there from this machine now; `nave endpoints {}` lists the instances' own ports",
            args.service
        ));
    }
    Ok(())
}

/// What the agent of this machine says.
async fn ask(hub: &Hub, host: &pb::Host, service: &str, port: &str) -> Option<SocketAddr> {
    let credentials = tls::operator(hub.context()).ok()?;
    let channel = tls::agent_channel(&host.address, host.id.parse().ok()?, &credentials);
    let request = pb::GetServiceAddressesRequest { service: service.to_owned() };
    let mut agent = AgentServiceClient::new(channel);
    let answer = tokio::time::timeout(ASK, agent.get_service_addresses(request)).await.ok()?.ok()?;
    answer.into_inner().addresses.get(port)?.parse().ok()
}

fn choose<'a>(
    manifest: &'a pb::Manifest,
    wanted: Option<&'a str>,
) -> Result<(&'a str, &'a pb::Port), Failure> {
    let names = || manifest.ports.keys().cloned().collect::<Vec<_>>().join(", ");
    match wanted {
        Some(name) => manifest.ports.get(name).map(|port| (name, port)).ok_or_else(|| {
            Failure::refused(format!("{} has no port {name:?}", manifest.name)).next(
                match manifest.ports.len() {
                    0 => "it has none at all".to_owned(),
                    _ => format!("it has {}", names()),
                },
            )
        }),
        None => match manifest.ports.len() {
            0 => Err(Failure::refused(format!("{} has no ports", manifest.name))),
            1 => {
                let (name, port) = manifest.ports.iter().next().expect("there is one");
                Ok((name, port))
            }
            _ => Err(Failure::usage(format!("{} has several ports: name one of {}", manifest.name, names()))),
        },
    }
}

/// The agent on this machine, else the first: with `nave dev` all are.
fn own_host<'a>(hosts: &'a [pb::Host], here: &str) -> Option<&'a pb::Host> {
    hosts.iter().find(|host| host.name == here).or(hosts.first())
}

fn prefix(own: Option<&pb::Host>) -> &str {
    own.and_then(|host| host.facts.as_ref())
        .map(|facts| facts.address_prefix.as_str())
        .filter(|prefix| !prefix.is_empty())
        .unwrap_or(PREFIX)
}

fn this_host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

fn address(prefix: &str, suffix: u32) -> Option<Ipv4Addr> {
    let suffix = u16::try_from(suffix).ok().filter(|suffix| *suffix != 0)?;
    let [high, low] = suffix.to_be_bytes();
    format!("{prefix}.{high}.{low}").parse().ok()
}

/// With the scheme where the protocol has one.
fn text(port: &pb::Port, address: SocketAddr) -> String {
    let scheme = match port.protocol() {
        pb::Protocol::Http | pb::Protocol::Http2 if port.service_port == 443 => "https://",
        pb::Protocol::Http | pb::Protocol::Http2 => "http://",
        pb::Protocol::Grpc | pb::Protocol::Tcp | pb::Protocol::Unspecified => "",
    };
    format!("{scheme}{address}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_prefix_and_suffix() {
        assert_eq!(address("127.88", 5), Some(Ipv4Addr::new(127, 88, 0, 5)));
        assert_eq!(address("127.89", 0x1234), Some(Ipv4Addr::new(127, 89, 0x12, 0x34)));
        assert_eq!(address("127.88", 0), None);
    }

    #[test]
    fn a_scheme_where_the_protocol_has_one() {
        let port = |protocol: pb::Protocol, service_port| pb::Port {
            protocol: protocol.into(),
            service_port,
            ..Default::default()
        };
        let at = |port| SocketAddr::from(([127, 88, 0, 5], port));
        assert_eq!(text(&port(pb::Protocol::Http, 80), at(80)), "http://127.88.0.5:80");
        assert_eq!(text(&port(pb::Protocol::Http, 80), at(20_080)), "http://127.88.0.5:20080");
        assert_eq!(text(&port(pb::Protocol::Tcp, 5432), at(5432)), "127.88.0.5:5432");
    }

    #[test]
    fn several_ports_need_a_name() {
        let mut manifest = pb::Manifest { name: "web".into(), ..Default::default() };
        assert!(choose(&manifest, None).unwrap_err().to_string().contains("no ports"));
        manifest.ports.insert("http".into(), pb::Port::default());
        choose(&manifest, None).unwrap();
        manifest.ports.insert("admin".into(), pb::Port::default());
        assert!(choose(&manifest, None).unwrap_err().to_string().contains("admin, http"));
        assert!(choose(&manifest, Some("x")).unwrap_err().to_string().contains("it has admin, http"));
    }
}
