//! What peers may ask, and the answers.

use nave_proto::pb;
use pb::KeeperErrorKind as Kind;
use pb::keeper_ledger_record::Record;
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;

use super::{Keeper, Mode, Stopping};
use crate::client;
use crate::clock::{MS, SECOND, boottime_ns};
use crate::ear::Ear;
use crate::kept::{Asker, Cause, Forgetting, Kept};
use crate::ledger::Key;
use crate::signal::{self, refusal, system};

/// For the cgroup directories of stopped services to become removable.
const CGROUPS_WITHIN_NS: i64 = 2 * SECOND;

/// An answer at once, or later.
type Answer = Result<Option<Reply>, pb::KeeperError>;

const DONE: Answer = Ok(Some(Reply::Done(pb::KeeperDone { heard: Vec::new() })));

impl Keeper {
    pub(super) fn answer(&mut self, connection: u32, request: pb::KeeperRequest) {
        let asker = Asker { connection, id: request.id };
        let is_agent = self.agent_connection == Some(connection);
        // A descriptor belongs to its request, also when that is refused.
        let descriptor = match &request.request {
            Some(Request::StoreDescriptor(_)) => {
                self.connections.get_mut(&connection).and_then(|peer| peer.take_descriptor())
            }
            _ => None,
        };
        let answer = match request.request {
            None => Ok(Some(Reply::Unsupported(pb::KeeperUnsupported {}))),
            Some(Request::List(_)) => {
                if is_agent && self.agent.is_ours() {
                    self.upgrade.agent_took_over();
                }
                Ok(Some(Reply::Processes(self.list())))
            }
            Some(Request::Status(_)) => Ok(Some(Reply::Status(self.status()))),
            Some(Request::Upgrade(upgrade)) => self.ask_upgrade(asker, upgrade).map(|()| None),
            Some(Request::Shutdown(shutdown)) => {
                let ns = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX / MS).saturating_mul(MS);
                let (grace_ns, orderly_ns) = (ns(shutdown.grace_ms), ns(shutdown.orderly_ms));
                self.stop(Some(asker), shutdown.stop_services, grace_ns, orderly_ns);
                Ok(None)
            }
            Some(Request::Hello(hello)) => Ok(Some(self.hello(connection, &hello))),
            Some(_) if !is_agent => Err(refusal(
                Kind::Invalid,
                "this connection is not the agent's: it said no hello, or another agent has since",
            )),
            Some(Request::Spawn(spawn)) => self.spawn(asker, spawn).map(|()| None),
            Some(Request::Signal(signal)) => self.signal(&signal),
            Some(Request::AcknowledgeExits(acknowledge)) => {
                let up_to = self.exits.acknowledge(acknowledge.up_to_sequence);
                if up_to > self.ledger.content().acknowledged_sequence {
                    self.ledger.note(Record::AcknowledgedSequence(up_to));
                }
                DONE
            }
            Some(Request::StoreDescriptor(store)) => match descriptor {
                Some(descriptor) => {
                    self.close_ear(&store.name);
                    let ear = store.speaker.map(|speaker| Ear::new(speaker, &[]));
                    let stored = self.descriptors.store(store.name, descriptor, ear);
                    stored.map_err(|why| refusal(Kind::Invalid, why)).and(DONE)
                }
                None => Err(refusal(Kind::Invalid, "no descriptor came with it")),
            },
            Some(Request::TakeDescriptor(take)) => match self.descriptors.duplicate(&take.name) {
                Ok(Some(descriptor)) => {
                    let heard = self.close_ear(&take.name);
                    return self.reply(asker, Reply::Done(pb::KeeperDone { heard }), Some(descriptor));
                }
                Ok(None) => Err(no_descriptor(&take.name)),
                Err(error) => Err(system("cannot duplicate it", &error)),
            },
            Some(Request::DropDescriptor(drop)) => {
                self.close_ear(&drop.name);
                if self.descriptors.remove(&drop.name) { DONE } else { Err(no_descriptor(&drop.name)) }
            }
            Some(Request::ListDescriptors(_)) => {
                let names = self.descriptors.iter().map(|(name, _)| name.clone()).collect();
                Ok(Some(Reply::Descriptors(pb::DescriptorList { names })))
            }
            Some(Request::SetDeadline(deadline)) => self.set_deadline(deadline),
            Some(Request::SetLogLimits(request)) => self.set_log_limits(&request),
            Some(Request::LookForOomKills(_)) => Ok(Some(Reply::OomKills(self.look_for_oom_kills()))),
            Some(Request::Forget(forget)) => self.forget(asker, &forget),
        };
        match answer {
            Ok(Some(reply)) => self.reply(asker, reply, None),
            Ok(None) => {}
            Err(error) => self.reply(asker, Reply::Error(error), None),
        }
    }

    /// A new agent takes the place of the one before, and hears of all exits that nobody acknowledged.
    fn hello(&mut self, connection: u32, hello: &pb::KeeperHello) -> Reply {
        if let Some(before) = self.agent_connection.filter(|before| *before != connection) {
            self.disconnect(before);
        }
        if hello.version != client::PROTOCOL_VERSION {
            crate::say!(
                "agent {} speaks version {} of the protocol, this keeper {}",
                hello.agent_version,
                hello.version,
                client::PROTOCOL_VERSION
            );
        }
        self.agent_connection = Some(connection);
        self.told_sequence = 0;
        // It hears again of a disk that refuses.
        self.logs.values_mut().for_each(|log| log.told_errno = 0);
        self.dropped_report_at.get_or_insert(boottime_ns());
        self.agent.said_hello();
        Reply::Welcome(pb::KeeperWelcome {
            version: client::PROTOCOL_VERSION,
            keeper_version: env!("CARGO_PKG_VERSION").to_owned(),
            keeper_pid: std::process::id(),
            boot_id: self.boot_id.clone(),
            damages: self.damages.clone(),
        })
    }

    fn list(&self) -> pb::ProcessList {
        let here = |kept: &&Kept| kept.process().is_some() || kept.is_leftover();
        pb::ProcessList { processes: self.table.values().filter(here).map(Kept::describe).collect() }
    }

    fn signal(&mut self, request: &pb::Signal) -> Answer {
        let key = Key { instance_id: request.instance_id, epoch: request.epoch };
        let kept = self.table.get_mut(&key).ok_or_else(|| not_kept(key))?;
        // 0: whichever attempt it is now.
        if request.attempt != 0 && request.attempt != kept.spawn.attempt {
            let message = format!("attempt {} is over, this is {}", request.attempt, kept.spawn.attempt);
            return Err(refusal(Kind::NotFound, message));
        }
        signal::send(kept, request.scope(), request.signal)?;
        if request.cause() != pb::ExitCause::Unspecified
            && let Some(process) = kept.process_mut()
        {
            process.cause = Some(Cause { cause: request.cause(), message: "" });
            self.ledger.note(Record::Signalled(*request));
        }
        DONE
    }

    fn set_deadline(&mut self, request: pb::SetDeadline) -> Answer {
        let key = Key { instance_id: request.instance_id, epoch: request.epoch };
        let kept = self.table.get_mut(&key).ok_or_else(|| not_kept(key))?;
        if kept.deadline_begun && kept.process().is_some() {
            return Err(refusal(Kind::Invalid, "its deadline has passed: it is being ended"));
        }
        kept.deadline = (request.boottime_ns != 0).then_some(request);
        kept.deadline_begun = false;
        self.ledger.note(Record::Deadline(request));
        DONE
    }

    fn set_log_limits(&mut self, request: &pb::SetLogLimits) -> Answer {
        let key = Key { instance_id: request.instance_id, epoch: request.epoch };
        let kept = self.table.get_mut(&key).ok_or_else(|| not_kept(key))?;
        let limits = request.limits.unwrap_or_default();
        kept.spawn.log_segment_bytes = limits.segment_bytes;
        kept.spawn.log_segments = limits.segments;
        kept.spawn.log_age_ms = limits.age_ms;
        // The next keeper hears of it from its agent.
        if let Some(open) = self.logs.get(&kept.spawn.log_dir) {
            self.output.limit(open.log, limits);
        }
        DONE
    }

    fn forget(&mut self, asker: Asker, request: &pb::Forget) -> Answer {
        let key = Key { instance_id: request.instance_id, epoch: request.epoch };
        // Asked twice, or of a keeper that never had it: there is nothing to remove.
        let Some(kept) = self.table.get_mut(&key) else { return DONE };
        if let Some(process) = kept.process() {
            let message = format!("it still runs, with pid {}: stop it first", process.identity.pid);
            return Err(refusal(Kind::Busy, message));
        }
        let closing = kept.forgetting.is_some();
        let log_dir = kept.spawn.log_dir.clone();
        let remove_logs =
            request.remove_logs || kept.forgetting.as_ref().is_some_and(|before| before.remove_logs);
        kept.forgetting = Some(Forgetting {
            asker,
            remove_logs,
            log_closed: kept.forgetting.as_ref().is_some_and(|before| before.log_closed),
            cgroup_removed: false,
            retry_at: 0,
            tries: 0,
        });
        // Another epoch may use the same directory; then it stays.
        let shared = self.table.iter().any(|(other, kept)| *other != key && kept.spawn.log_dir == log_dir);
        let log = self.logs.get(&log_dir).map(|open| open.log).filter(|_| !shared);
        match log {
            Some(log) if !closing => self.output.close(log, true, remove_logs),
            Some(_) => {}
            None => {
                if let Some(forgetting) = self.table.get_mut(&key).and_then(|kept| kept.forgetting.as_mut()) {
                    forgetting.log_closed = true;
                }
            }
        }
        Ok(None)
    }

    /// Begins the end: of services as well when asked, by their agent when it gets the time and is there.
    pub(super) fn stop(&mut self, asker: Option<Asker>, services: bool, grace_ns: i64, orderly_ns: i64) {
        let now = boottime_ns();
        let orderly = (services && orderly_ns > 0 && !self.is_stopping() && self.agent.rest())
            .then_some((now.saturating_add(orderly_ns), grace_ns));
        if let Mode::Stopping(stopping) = &mut self.mode {
            // Asked again: the newest asker hears of it, and more may be asked for, not less.
            stopping.asker = asker.or(stopping.asker);
            stopping.services |= services;
            stopping.orderly = None;
        } else {
            self.mode =
                Mode::Stopping(Stopping { asker, services, orderly, look_at: now, cgroups_until: now });
        }
        if services && orderly.is_none() {
            self.stop_services(now, grace_ns);
        }
    }

    /// All that still runs, at once.
    pub(super) fn stop_services(&mut self, now: i64, grace_ns: i64) {
        let kill_at = now.saturating_add(grace_ns);
        if let Mode::Stopping(stopping) = &mut self.mode {
            stopping.cgroups_until = kill_at.saturating_add(CGROUPS_WITHIN_NS);
        }
        for kept in self.table.values_mut() {
            let cause = Cause { cause: pb::ExitCause::Operator, message: "stopped with its keeper" };
            begin_ladder(kept, (pb::SignalScope::Process, libc::SIGTERM), kill_at, cause);
            // One that has been asked for longer gets no more time than the others.
            if let Some(ladder) = kept.ladder.as_mut().filter(|ladder| ladder.kills == 0) {
                ladder.kill_at = ladder.kill_at.min(kill_at);
            }
        }
    }
}

/// Asks a process to end, and has all of its cgroup killed from `kill_at` on.
pub(super) fn begin_ladder(
    kept: &mut Kept,
    (scope, signal): (pb::SignalScope, i32),
    kill_at: i64,
    cause: Cause,
) {
    if let Some(process) = kept.process_mut() {
        // One that its agent has asked already is not asked twice: some programs take that for an order to hurry.
        if process.cause.is_none() {
            process.cause = Some(cause);
            let _ = signal::send(kept, scope, signal);
        }
    } else if !kept.is_leftover() {
        return;
    }
    kept.ladder.get_or_insert(crate::kept::Ladder { kill_at, kills: 0 });
}

fn not_kept(key: Key) -> pb::KeeperError {
    let Key { instance_id, epoch } = key;
    refusal(Kind::NotFound, format!("instance {instance_id} of epoch {epoch} is not known here"))
}

fn no_descriptor(name: &str) -> pb::KeeperError {
    refusal(Kind::NotFound, format!("no descriptor is stored as {name:?}"))
}
