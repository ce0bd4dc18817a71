//! HTTP/1.1, caller to endpoint (RFC 9110, RFC 9112). An engine of our own: heads go on byte by byte as they came but
//! for a few lines, so names keep their spelling and their order, nothing is built to be thrown away, and a request costs
//! two reads and two writes. What two readers could read in two ways is refused before anything is sent.
//!
//! [`serve`] is the door. Heads ([`request`], [`response`]) and bodies ([`framing`]) are pure; [`sender`] and
//! [`receiver`] move bytes, [`passing`] both at once; [`exchange`] decides what is tried again.

mod alarm;
mod buffer;
mod connection;
mod exchange;
mod framing;
mod inbound;
mod lines;
mod passing;
mod receiver;
mod refusal;
mod replay;
mod request;
mod response;
mod sender;
#[cfg(test)]
mod tests;
pub(super) mod trace;
mod tunnel;
mod upstream;

pub(crate) use connection::serve;
pub(crate) use inbound::{Ending, serve_peer};
pub(crate) use upstream::Pool;
