//! RocksDB options of both databases, and its errors as `io::Error`. Sized for a small member: memtables of 8 MiB, one
//! block cache of 8 MiB, two background threads, so that an idle member stays well below its 60 MiB.

use std::io;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode, LogLevel,
    Options,
};

const BLOCK_CACHE_BYTES: usize = 8 * 1024 * 1024;
const MEMTABLE_BYTES: usize = 8 * 1024 * 1024;
/// WAL files kept for reuse: their size is already in the inode, so an fdatasync of a full one journals no metadata
/// (+13 to 32 % throughput in the spike with a pre-zeroed file).
const RECYCLED_WALS: usize = 2;

/// What both databases share.
fn common() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_paranoid_checks(true);
    options.set_max_background_jobs(2);
    options.set_max_open_files(64);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1024 * 1024);
    options.set_log_level(LogLevel::Warn);
    options.set_stats_dump_period_sec(0);
    options.set_avoid_unnecessary_blocking_io(true);
    options.set_max_total_wal_size(64 * 1024 * 1024);
    options
}

/// The log database.
///
/// Recovery is `PointInTime`, because RocksDB 11.8 turns WAL recycling off for `TolerateCorruptedTailRecords`
/// (`db_impl_open.cc`, `SanitizeOptions`). Both keep every record that was synced before a crash. They differ when the
/// disk itself damages a record: this one ends the log there, and Raft fetches the rest from the others; the other
/// refuses to open. Measured on a busy machine, a synced write of 300 bytes took 90 to 230 us with recycling and 230 to
/// 390 us without (10th percentile).
pub(crate) fn log_options() -> Options {
    let mut options = common();
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_recycle_log_file_num(RECYCLED_WALS);
    options.set_atomic_flush(true);
    options
}

/// The state database: written without a write-ahead log, a prefix of the applied entries after a crash, which Raft's
/// log completes. Without one only an atomic flush keeps column families together.
pub(crate) fn state_options() -> Options {
    let mut options = common();
    // Builds before this one had one.
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_atomic_flush(true);
    options
}

fn column_family(name: &str, cache: &Cache) -> ColumnFamilyDescriptor {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(MEMTABLE_BYTES);
    options.set_max_write_buffer_number(4);
    options.set_compression_type(DBCompressionType::Lz4);
    // What is written is seldom read before it is written over or purged: merged late, most of it is gone by then.
    options.set_level_zero_file_num_compaction_trigger(16);
    // Never slow a write down for a compaction that lags: the log's writer must not wait, and the state's rows are few.
    options.set_level_zero_slowdown_writes_trigger(1 << 30);
    options.set_level_zero_stop_writes_trigger(1 << 30);
    options.set_soft_pending_compaction_bytes_limit(512 << 30);
    options.set_hard_pending_compaction_bytes_limit(2 << 40);
    ColumnFamilyDescriptor::new(name, options)
}

/// Opens a database with the two column families named.
pub(crate) fn open(options: &Options, path: &std::path::Path, families: [&str; 2]) -> io::Result<DB> {
    let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
    let mut descriptors = vec![column_family("default", &cache)];
    descriptors.extend(families.iter().map(|name| column_family(name, &cache)));
    DB::open_cf_descriptors(options, path, descriptors)
        .map_err(|e| io::Error::other(format!("open {}: {e}", path.display())))
}

pub(crate) fn io_error(error: rocksdb::Error) -> io::Error {
    io::Error::other(error)
}
