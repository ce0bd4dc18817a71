//! What is noted of each call that is over: its counts, its span, and where a service wants it a line of the access log.

use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::balancer::EndpointKey;
use nave_agent_core::directory::PortRules;

use super::access::AccessLog;
use super::http1::trace::Trace;
use super::meter::Class;
use super::spans::{Label, Name, Span, Spans};
use crate::clock;

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Records {
    pub(crate) spans: Spans,
    pub(crate) access: AccessLog,
}

/// A call of HTTP that is over.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) trace: Trace,
    pub(crate) name: Name,
    /// Who was asked last.
    pub(crate) endpoint: Option<EndpointKey>,
    pub(crate) class: Class,
    pub(crate) took: Duration,
    pub(crate) retries: usize,
}

impl Records {
    /// Notes a call. The caller's host logs it, not the callee's too.
    pub(crate) fn call(&self, label: &Arc<Label>, rules: &PortRules, call: Call) {
        let Call { trace, name, endpoint, class, took, retries } = call;
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if rules.access_log && !label.is_peer {
            let line = serde_json::json!({
                "port": *label.port,
                "caller": label.caller,
                "instance": endpoint.map(|key| key.instance.to_string()),
                "call": name.text(),
                "class": class.word(),
                "took_us": took_ns / 1000,
                "retries": retries,
                "trace": trace.id.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            });
            self.access.write(&label.service, line.to_string());
        }
        let begun_unix_ns = clock::wall_unix_ns().saturating_sub_unsigned(took_ns);
        let label = label.clone();
        self.spans.add(Span { label, trace, name, endpoint, class, begun_unix_ns, took_ns, retries });
    }
}
