//! Compiles `nave/v1/*.proto` with protox, so that no `protoc` is needed on the machine.

use std::path::PathBuf;

use prost::Message as _;

const FILES: [&str; 12] = [
    "nave/v1/manifest.proto",
    "nave/v1/instance.proto",
    "nave/v1/host.proto",
    "nave/v1/service.proto",
    "nave/v1/hosts.proto",
    "nave/v1/cluster.proto",
    "nave/v1/directory.proto",
    "nave/v1/session.proto",
    "nave/v1/traffic.proto",
    "nave/v1/raft.proto",
    "nave/v1/command.proto",
    "nave/v1/keeper.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=nave");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("nave.v1.bin"), descriptors.encode_to_vec())?;
    let grpc = std::env::var_os("CARGO_FEATURE_GRPC").is_some();
    let config = prost_build_config();
    tonic_prost_build::configure()
        .build_server(grpc)
        .build_client(grpc)
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}

/// Ordered maps, since encodings must be the same on every member; `Bytes` where bodies pass through; what is large and is
/// handed on from hand to hand, or mostly absent, behind a pointer: a manifest is more than a kilobyte by itself.
fn prost_build_config() -> tonic_prost_build::Config {
    let mut config = tonic_prost_build::Config::new();
    config.btree_map(["."]);
    config.bytes([
        ".nave.v1.Entry.command",
        ".nave.v1.ProposeRequest.commands",
        ".nave.v1.ProposeOutcome.reply",
        ".nave.v1.SnapshotChunk.data",
        ".nave.v1.LogLine.text",
    ]);
    for holder in ["ApplyServiceRequest", "ApplyService", "ServiceRecord", "VersionRecord"] {
        config.boxed(format!(".nave.v1.{holder}.manifest"));
    }
    config
}
