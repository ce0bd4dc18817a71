//! Whatever crosses a socket or outlives a process: the `nave.v1` messages, the ids, the manifest, and the
//! vocabulary that hub, agent and person share. Every other crate depends on this one and it on none of them.
//! Without the `grpc` feature it links no tokio and no tonic, which is how the cores and the keeper use it.

pub mod constraint;
pub mod ids;
pub mod lease;
pub mod limits;
pub mod manifest;
pub mod signals;
pub mod time;
pub mod token;
pub mod words;

/// The messages and, with `grpc`, the client and server stubs of `nave.v1`, as compiled from `nave/v1/*.proto`.
pub mod pb {
    #![allow(
        clippy::all,
        clippy::disallowed_types,
        clippy::allow_attributes,
        clippy::allow_attributes_without_reason,
        missing_docs,
        missing_debug_implementations,
        unreachable_pub,
        rustdoc::all,
        reason = "generated"
    )]
    include!(concat!(env!("OUT_DIR"), "/nave.v1.rs"));
}

/// The compiled file descriptors of `nave.v1`, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nave.v1.bin"));

/// The newest command format that this build knows; it rises when a new command number is added, or when a command is to
/// be applied in another way. What is written into the log is of the format that all members know. A member that meets a
/// later one stops and names both (see `command.proto`).
pub const COMMAND_FORMAT: u32 = 9;

/// Among the capabilities of a host: its agent knows `WantedInstance.fetch` and reports what became of it.
pub const FETCHES_AHEAD: &str = "fetch_ahead";

/// The layout version of data directories (member and agent). A directory with a greater one is refused.
pub const DATA_FORMAT: u32 = 1;
