//! What Nave promises, proved on real members, keepers and agents: one file per promise.

mod agent_killed;
mod agent_partitioned;
mod all_members_killed;
mod bad_input;
mod bad_manifests;
mod brake;
mod cloned_host;
mod deploy_and_serve;
mod dev;
mod drain;
mod full_disk;
mod hosts_lost;
mod hub_away;
mod keeper_killed;
mod leader_killed_under_writes;
mod leader_restarted_at_once;
mod logs;
mod manifests;
mod members;
mod never_twice;
mod partitions;
mod quorum_lost;
mod rolling;
mod snapshots;
mod strangers;
