//! The engine between real sockets: endpoints that behave and endpoints that do not.

mod between;
mod harness;
mod passing;
mod refusing;
mod retrying;
