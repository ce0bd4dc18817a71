//! One question, one answer. Pure: who knows the services is an argument.
//!
//! `0.web.nave.internal` is one instance alone, by its ordinal. `web.nave.internal` has the service's address (A; every other type is empty at once, since callers ask for AAAA
//! beside it and wait for both); `_http._tcp.web.nave.internal` has its port (SRV), also where that is not the declared
//! one. What is in the zone and not known does not exist; what is outside is refused, and the libc asks the next
//! server: glibc goes on at once after REFUSED, and musl, which asks all servers at a time, leaves it out. To forward
//! instead would put the agent into the way of every name of the host.

use std::net::Ipv4Addr;

use simple_dns::rdata::{A, OPT, RData, SRV};
use simple_dns::{
    CLASS, Name, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE,
};

/// Where all names of services are.
pub(crate) const ZONE: &str = "nave.internal";
/// Addresses never change; a service that is gone is still asked for so long.
const TTL_SECONDS: u32 = 30;
/// Answers have a few hundred bytes; nothing is ever cut.
const UDP_BYTES: u16 = 1232;

/// What is asked of a service.
pub(crate) trait Names {
    /// Its address on this host; `None`: no service with ports has that name.
    fn address(&self, service: &str) -> Option<Ipv4Addr>;
    /// Where callers on this host find one of its ports.
    fn port(&self, service: &str, port: &str) -> Option<u16>;
    /// The address on this host that leads to one instance alone, by its ordinal.
    fn single(&self, service: &str, ordinal: &str) -> Option<Ipv4Addr>;
    /// Where callers find one of its ports.
    fn single_port(&self, service: &str, ordinal: &str, port: &str) -> Option<u16>;
}

/// The answer to a packet; `None`: it is no question, so nobody waits for one.
pub(crate) fn answer(names: &impl Names, packet: &[u8]) -> Option<Vec<u8>> {
    let Ok(query) = Packet::parse(packet) else { return malformed(packet) };
    if query.has_flags(PacketFlag::RESPONSE) {
        return None;
    }
    let mut reply = Packet::new_reply(query.id());
    *reply.opcode_mut() = query.opcode();
    if query.has_flags(PacketFlag::RECURSION_DESIRED) {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    if query.opt().is_some() {
        *reply.opt_mut() = Some(OPT { opt_codes: Vec::new(), udp_packet_size: UDP_BYTES, version: 0 });
    }
    reply.questions = query.questions.clone();
    let (code, records) = match query.questions.as_slice() {
        _ if query.opcode() != OPCODE::StandardQuery => (RCODE::NotImplemented, Vec::new()),
        [question] => resolve(names, question),
        _ => (RCODE::FormatError, Vec::new()),
    };
    if code != RCODE::Refused {
        reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    }
    *reply.rcode_mut() = code;
    reply.answers = records;
    reply.build_bytes_vec_compressed().ok()
}

/// With its id, when there is one, and nothing else that it says.
fn malformed(packet: &[u8]) -> Option<Vec<u8>> {
    let [high, low, flags, ..] = *packet else { return None };
    let is_response = flags & 0x80 != 0;
    if is_response || packet.len() < 12 {
        return None;
    }
    let mut reply = Packet::new_reply(u16::from_be_bytes([high, low]));
    *reply.rcode_mut() = RCODE::FormatError;
    reply.build_bytes_vec().ok()
}

fn resolve<'a>(names: &impl Names, question: &Question<'a>) -> (RCODE, Vec<ResourceRecord<'a>>) {
    let labels: Vec<String> =
        question.qname.as_bytes().map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let ([inner @ .., "nave", "internal"], QCLASS::CLASS(CLASS::IN) | QCLASS::ANY) =
        (labels.as_slice(), question.qclass)
    else {
        return (RCODE::Refused, Vec::new());
    };
    let asks = |of: TYPE| question.qtype == QTYPE::ANY || question.qtype == QTYPE::TYPE(of);
    let data = match inner {
        // The zone itself has no records, and is there.
        [] => Some(None),
        [service] => names
            .address(service)
            .map(|address| asks(TYPE::A).then(|| RData::A(A { address: address.to_bits() }))),
        [port, "_tcp", service] => port
            .strip_prefix('_')
            .and_then(|port| names.port(service, port))
            .map(|port| asks(TYPE::SRV).then(|| target(service, port))),
        [ordinal, service] => names
            .single(service, ordinal)
            .map(|address| asks(TYPE::A).then(|| RData::A(A { address: address.to_bits() }))),
        [port, "_tcp", ordinal, service] => port
            .strip_prefix('_')
            .and_then(|port| names.single_port(service, ordinal, port))
            .map(|port| asks(TYPE::SRV).then(|| target(&format!("{ordinal}.{service}"), port))),
        _ => None,
    };
    let Some(data) = data else { return (RCODE::NameError, Vec::new()) };
    let record = |data| ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL_SECONDS, data);
    (RCODE::NoError, data.map(record).into_iter().collect())
}

fn target<'a>(service: &str, port: u16) -> RData<'a> {
    let name = format!("{service}.{ZONE}");
    let target = Name::new_unchecked(&name).into_owned();
    RData::SRV(SRV { priority: 0, weight: 0, port, target })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Web;

    impl Names for Web {
        fn address(&self, service: &str) -> Option<Ipv4Addr> {
            (service == "web").then_some(Ipv4Addr::new(127, 88, 0, 5))
        }

        fn port(&self, service: &str, port: &str) -> Option<u16> {
            (service == "web" && port == "http").then_some(20_080)
        }

        fn single(&self, service: &str, ordinal: &str) -> Option<Ipv4Addr> {
            (service == "web" && ordinal == "0").then_some(Ipv4Addr::new(127, 88, 255, 254))
        }

        fn single_port(&self, service: &str, ordinal: &str, port: &str) -> Option<u16> {
            (service == "web" && ordinal == "0" && port == "http").then_some(80)
        }
    }

    fn ask(name: &str, of: TYPE) -> (RCODE, Vec<String>) {
        let mut query = Packet::new_query(77);
        query.set_flags(PacketFlag::RECURSION_DESIRED);
        let name = Name::new(name).unwrap();
        query.questions.push(Question::new(name, QTYPE::TYPE(of), QCLASS::CLASS(CLASS::IN), false));
        let answered = answer(&Web, &query.build_bytes_vec().unwrap()).unwrap();
        let reply = Packet::parse(&answered).unwrap();
        assert_eq!((reply.id(), reply.questions.len()), (77, 1));
        assert!(reply.has_flags(PacketFlag::RESPONSE | PacketFlag::RECURSION_DESIRED));
        let data = |record: &ResourceRecord<'_>| {
            assert_eq!(record.ttl, TTL_SECONDS);
            match &record.rdata {
                RData::A(a) => Ipv4Addr::from_bits(a.address).to_string(),
                RData::SRV(srv) => format!("{}:{}", srv.target, srv.port),
                other => panic!("{other:?}"),
            }
        };
        (reply.rcode(), reply.answers.iter().map(data).collect())
    }

    #[test]
    fn names_of_services_have_their_address_and_their_ports() {
        let one = |text: &str| (RCODE::NoError, vec![text.to_owned()]);
        let empty = (RCODE::NoError, Vec::new());
        assert_eq!(ask("web.nave.internal", TYPE::A), one("127.88.0.5"));
        assert_eq!(ask("WEB.Nave.Internal", TYPE::A), one("127.88.0.5"));
        assert_eq!(
            ask("web.nave.internal", TYPE::AAAA),
            empty,
            "at once, and not that there is no such name"
        );
        assert_eq!(ask("web.nave.internal", TYPE::TXT), empty);
        assert_eq!(ask("nave.internal", TYPE::A), empty);
        assert_eq!(ask("_http._tcp.web.nave.internal", TYPE::SRV), one("web.nave.internal:20080"));
        assert_eq!(ask("_http._tcp.web.nave.internal", TYPE::A), empty);
        assert_eq!(ask("0.web.nave.internal", TYPE::A), one("127.88.255.254"));
        assert_eq!(ask("0.web.nave.internal", TYPE::AAAA), empty);
        assert_eq!(ask("_http._tcp.0.web.nave.internal", TYPE::SRV), one("0.web.nave.internal:80"));
    }

    #[test]
    fn what_is_not_known_does_not_exist_and_what_is_others_is_refused() {
        for name in
            ["db.nave.internal", "1.web.nave.internal", "0.db.nave.internal", "_x._tcp.web.nave.internal"]
        {
            assert_eq!(ask(name, TYPE::A).0, RCODE::NameError, "{name}");
        }
        for name in ["web", "example.org", "nave.internal.example.org", "internal"] {
            assert_eq!(ask(name, TYPE::A).0, RCODE::Refused, "{name}");
        }
    }

    #[test]
    fn what_is_no_question_is_answered_with_an_error_or_not_at_all() {
        assert_eq!(answer(&Web, b""), None);
        assert_eq!(answer(&Web, &[0; 11]), None);
        let mut response = Packet::new_reply(3).build_bytes_vec().unwrap();
        assert_eq!(answer(&Web, &response), None, "two servers could answer each other for ever");
        response.truncate(12);
        let code = |packet: &[u8]| Packet::parse(&answer(&Web, packet).unwrap()).unwrap().rcode();
        let nothing_asked = Packet::new_query(3).build_bytes_vec().unwrap();
        assert_eq!(code(&nothing_asked), RCODE::FormatError);
        let mut torn = nothing_asked;
        torn[5] = 1; // a question that is not there
        assert_eq!(code(&torn), RCODE::FormatError);
        // A name that points at itself.
        let looping = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1];
        assert_eq!(code(&looping), RCODE::FormatError);
    }

    #[test]
    fn no_packet_ends_the_server() {
        use rand::{Rng as _, SeedableRng as _};
        let mut rng = rand::rngs::StdRng::seed_from_u64(5);
        let mut query = Packet::new_query(1);
        let name = Name::new("_http._tcp.web.nave.internal").unwrap();
        query.questions.push(Question::new(name, QTYPE::ANY, QCLASS::CLASS(CLASS::IN), false));
        let good = query.build_bytes_vec().unwrap();
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            bytes.truncate(rng.random_range(0..=bytes.len()));
            answer(&Web, &bytes);
        }
    }
}
