//! The proxy: calls made to a service's address on this host go to one of its endpoints, by the balancer's choice.
//!
//! It has threads of its own, so that neither a burst of the agent's work stalls traffic nor traffic the agent.

#![expect(dead_code, reason = "the engines and the table come next")]

mod http1;
mod identity;
mod meter;
mod route;
