//! What agents say to each other beside a call. Only agents get to say it: these headers are believed on connections
//! whose other end has shown an agent's certificate, and left out of everybody else's requests.

use std::fmt;

use nave_agent_core::balancer::EndpointKey;
use nave_proto::ids::InstanceId;

/// Names the caller as its own agent knows it; the callee's process gets to see it.
pub(crate) const CALLER: &str = "Nave-Caller";
/// Names the endpoint that the caller's agent has chosen.
pub(crate) const TO: &str = "Nave-To";
/// In a response: the request has reached no process, so sending it elsewhere is safe whatever it is.
pub(crate) const NOT_PROCESSED: &str = "Nave-Not-Processed";

/// Where a request from another agent is to go: `<service> <port> <instance> <epoch>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct To {
    pub(crate) service: String,
    pub(crate) port: String,
    pub(crate) endpoint: EndpointKey,
}

impl To {
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(value).ok()?.split(' ');
        let (service, port) = (words.next()?.to_owned(), words.next()?.to_owned());
        let (instance, epoch) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let endpoint = EndpointKey { instance: InstanceId(instance), epoch };
        words.next().is_none().then_some(Self { service, port, endpoint })
    }
}

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EndpointKey { instance, epoch } = self.endpoint;
        write!(f, "{} {} {} {epoch}", self.service, self.port, instance.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let endpoint = EndpointKey { instance: InstanceId(7), epoch: 2 };
        let to = To { service: "db".to_owned(), port: "main".to_owned(), endpoint };
        assert_eq!(To::parse(to.to_string().as_bytes()), Some(to));
        for wrong in ["", "db", "db main 7", "db main x 2", "db main 7 2 3", "db  main 7 2"] {
            assert_eq!(To::parse(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
