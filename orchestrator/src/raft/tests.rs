//! Whole members over real TLS on the loopback interface, and openraft's own suite on the real stores.

mod cluster;
mod faults;
mod measure;
mod stores;
mod wire;
