//! Every bound of the state, each with its arithmetic. They are part of what a log means: a member with other
//! numbers would come to other rows, so a change here needs a new command format.

/// Services, those being deleted included. A service without instances costs about 2 KiB, so a full table is 2 GiB.
pub const SERVICES_MAX: usize = 1_000_000;

/// Instances one service may want. A plan holds each as a step of about 100 bytes: 1 MB for the greatest.
pub const COUNT_MAX: u32 = 10_000;

/// Instances in all: about 1 KiB each, 2 GB.
pub const INSTANCES_MAX: usize = 2_000_000;

/// Hosts: about 2 KiB each, 200 MB. A placement looks at those that fit best, not at all.
pub const HOSTS_MAX: usize = 100_000;

/// Join tokens, exhausted ones included until they expire: 200 bytes each, 200 KB.
pub const TOKENS_MAX: usize = 1_000;

/// Members that are joining at one time: a person starts each.
pub const MEMBERS_JOINING_MAX: usize = 4;

/// Ids of removed members kept in the cluster's row, 2 bytes each. One is needed until the member has left.
pub const MEMBERS_RETIRED_KEPT: usize = 64;

/// Version records kept per service, besides the stable one and those that an instance still runs.
pub const VERSIONS_KEPT: usize = 10;

/// Events kept for one service, and for one host as far as they concern no service.
pub const EVENTS_PER_SUBJECT_MAX: usize = 50;

/// Events kept in all: about 400 bytes each, 8 MB.
pub const EVENTS_MAX: usize = 20_000;

/// Replies remembered per client: as many writes as a client may have under way.
pub const DEDUP_REPLIES_MAX: usize = 16;

/// Clients remembered: 16 replies of about 60 bytes each, 10 MB.
pub const DEDUP_CLIENTS_MAX: usize = 10_000;

/// A client that has written nothing for this long is forgotten; its retries end within seconds.
pub const DEDUP_IDLE_NS: i64 = 600 * SECOND_NS;

/// Idle clients forgotten by one command. More than one, so that the table shrinks while clients come and go.
pub const DEDUP_EXPIRED_PER_COMMAND: usize = 16;

/// Address suffixes: 16 bits under the agent's prefix. The first 256 are the agent's own (its DNS is on .0.1)
/// and the last is a broadcast address in people's eyes.
pub const ADDRESS_SUFFIXES: std::ops::RangeInclusive<u32> = 256..=65_534;

/// User ids of services: a range that neither distributions, systemd (dynamic users 61184.., containers up to
/// 1879048191) nor useradd's subordinate ids (100000..) hand out.
pub const UIDS: std::ops::RangeInclusive<u32> = 1_900_000_000..=1_999_999_999;

/// An instance that nothing probes is ready as soon as it runs; only after this is it believed to be, so that a program
/// that ends at once replaces nothing and is never called stable. Most that cannot work say so sooner.
pub const UNPROBED_READY_NS: i64 = SECOND_NS;

/// Runs of a job that are remembered, at about 300 bytes each in its service's row: 6 KB.
pub const JOB_RUNS_KEPT: usize = 20;

/// A run that starts no later than this after it was due was not missed: a change of leaders takes seconds.
pub const JOB_LATE_NS: i64 = 60 * SECOND_NS;

/// Missed runs counted one by one: two months of minutes, a tenth of a second.
pub const JOB_MISSED_MAX: u32 = 100_000;

/// An instance that gave up on its host is placed again after this, doubled each time, at most
/// [`RESCHEDULE_DELAY_MAX_NS`].
pub const RESCHEDULE_DELAY_NS: i64 = 30 * SECOND_NS;

/// The longest wait before an instance that gave up is placed again.
pub const RESCHEDULE_DELAY_MAX_NS: i64 = 600 * SECOND_NS;

/// An instance that was lost with its host is placed again at once; when it was placed less than
/// [`LOSS_MEMORY_NS`] before and had been lost before that, after this, doubled each time, at most
/// [`LOSS_DELAY_MAX_NS`]. Hosts that come and go every few seconds so move an instance about 20 times in an hour.
pub const LOSS_DELAY_NS: i64 = SECOND_NS;

/// The longest wait before an instance that was lost is placed again.
pub const LOSS_DELAY_MAX_NS: i64 = 300 * SECOND_NS;

/// An instance that stayed on its host for this long has forgotten its losses.
pub const LOSS_MEMORY_NS: i64 = 600 * SECOND_NS;

/// A host that was lost takes new instances only after all others for this long.
pub const UNSTEADY_NS: i64 = 600 * SECOND_NS;

/// Services that one slice of a plan looks at: about a microsecond each under the state's read lock, so 5 ms.
pub const LOOKS_PER_SLICE: usize = 5_000;

/// Hosts that one slice of a plan judges before it looks at no further service: a tenth of a microsecond each, so
/// 10 ms. It is what bounds a slice when there is no room, for then every host is judged.
pub const HOSTS_JUDGED_PER_SLICE: usize = 100_000;

/// Steps of one `CommitPlan`: at about 100 bytes each, 100 KB; and what the state's read lock is held for to find them.
pub const STEPS_PER_COMMAND: usize = 1_024;

/// How long an instance that is to stop stays for others that need it and are to stop too. A stop takes a drain of 30 s
/// and a grace of 10 s unless the manifest says otherwise, so this is for some in a row, and for a replacement elsewhere.
pub const NEEDED_STOP_WAIT_NS: i64 = 300 * SECOND_NS;

/// For how long a slot stays empty at most because what left it has yet to leave its host, where the successor's
/// artifacts are: a drain of 30 s, a grace of 10 s, and as much again. After that it goes elsewhere, and fetches there.
pub const FETCHED_STOP_WAIT_NS: i64 = 80 * SECOND_NS;

/// What an agent says of a fetch that failed is a sentence; more is cut off.
pub const FETCH_PROBLEM_CHARS_MAX: usize = 500;

/// One second in nanoseconds.
pub const SECOND_NS: i64 = 1_000_000_000;
