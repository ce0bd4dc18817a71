//! How much of an instance's output is kept: from the manifest's words to the keeper's.

use std::time::Duration;

use nave_proto::pb;
use nave_proto::time::from_proto;

/// A log goes by whole files: so many of them, so that about this part of it goes at a time.
const SEGMENTS: u32 = 5;
/// What manifests of older builds mean.
const MAX_SIZE_BYTES: u64 = 50 * 1024 * 1024;
/// And of services that nobody knows any longer.
pub(crate) const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

pub(crate) fn log_limits(manifest: &pb::Manifest) -> pb::LogLimits {
    let logs = manifest.logs.as_ref();
    let bytes = logs.map_or(0, |logs| logs.max_size_bytes);
    let bytes = if bytes == 0 { MAX_SIZE_BYTES } else { bytes };
    pb::LogLimits {
        segment_bytes: bytes / u64::from(SEGMENTS),
        segments: SEGMENTS,
        age_ms: u64::try_from(max_age(manifest).as_millis()).unwrap_or(u64::MAX),
    }
}

pub(crate) fn max_age(manifest: &pb::Manifest) -> Duration {
    manifest.logs.as_ref().and_then(|logs| from_proto(logs.max_age.as_ref()?)).unwrap_or(MAX_AGE)
}
