//! `nave exec-stub`: between fork and the service's own program, it makes the clean world that the program starts in.
//!
//! A fresh image of our own binary does this rather than the forked keeper, because after a fork with threads hardly
//! anything is safe to call, and because a keeper that sets users and limits on itself is one mistake away from
//! keeping them. It reads [`pb::ExecOrders`] from a sealed memfd, waits for the keeper's word (that the process is
//! noted in the ledger), and ends in execve, or in a [`Failure`] on the same socket. The socket closing without one
//! tells the keeper that the program runs.

use std::env;
use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nave_proto::pb;
use nix::errno::Errno;
use nix::unistd::{Gid, Uid};
use prost::Message;

use crate::{ahead, sandbox, sys};

/// Where starting a program failed. The numbers go between a keeper and a stub of the same build, or of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Stub = 1,
    Orders = 2,
    Session = 3,
    OomScore = 4,
    Nice = 5,
    Limit = 6,
    CgroupFile = 7,
    Cgroup = 8,
    Output = 9,
    Descriptors = 10,
    Groups = 11,
    Group = 12,
    User = 13,
    Privileges = 14,
    WorkingDir = 15,
    Lookup = 16,
    Exec = 17,
    Interpreter = 18,
    Namespace = 19,
    Mount = 20,
    Capabilities = 21,
    Landlock = 22,
    Seccomp = 23,
    Notify = 24,
    CgroupMake = 25,
}

const STEPS: [Step; 25] = [
    Step::Stub,
    Step::Orders,
    Step::Session,
    Step::OomScore,
    Step::Nice,
    Step::Limit,
    Step::CgroupFile,
    Step::Cgroup,
    Step::Output,
    Step::Descriptors,
    Step::Groups,
    Step::Group,
    Step::User,
    Step::Privileges,
    Step::WorkingDir,
    Step::Lookup,
    Step::Exec,
    Step::Interpreter,
    Step::Namespace,
    Step::Mount,
    Step::Capabilities,
    Step::Landlock,
    Step::Seccomp,
    Step::Notify,
    Step::CgroupMake,
];

/// Why a program does not run: which step, errno, and of what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) step: Step,
    pub(crate) errno: i32,
    pub(crate) what: String,
}

/// The highest number that a program may want its notification descriptor under.
const NOTIFY_FD_MAX: i32 = 255;

/// Longer names are cut: the report is one datagram.
const WHAT_BYTES_MAX: usize = 1024;

impl Failure {
    pub(crate) fn new(step: Step, error: impl Into<io::Error>, what: impl Into<String>) -> Self {
        Self { step, errno: error.into().raw_os_error().unwrap_or(libc::EINVAL), what: what.into() }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.step as u8];
        bytes.extend(self.errno.to_le_bytes());
        bytes.extend(self.what.bytes().take(WHAT_BYTES_MAX));
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (step, rest) = bytes.split_first()?;
        let (errno, what) = rest.split_first_chunk::<4>()?;
        let step = STEPS.into_iter().find(|known| *known as u8 == *step).unwrap_or(Step::Stub);
        Some(Self {
            step,
            errno: i32::from_le_bytes(*errno),
            what: String::from_utf8_lossy(what).into_owned(),
        })
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = &self.what;
        match self.step {
            Step::Stub => write!(f, "cannot start the exec-stub {what}")?,
            Step::Orders => write!(f, "exec-stub cannot read its orders {what}")?,
            Step::Session => write!(f, "cannot make a session of its own")?,
            Step::OomScore => write!(f, "cannot set oom_score_adj to {what}")?,
            Step::Nice => write!(f, "cannot set nice to {what}")?,
            Step::Limit => write!(f, "cannot set resource limit {what}")?,
            Step::CgroupFile => write!(f, "cannot write {what}")?,
            Step::Cgroup => {
                return write!(f, "cannot enter cgroup {what}: {}", describe_cgroup(self.errno));
            }
            Step::CgroupMake => {
                return write!(f, "cannot make cgroup {what}: {}", describe_cgroup(self.errno));
            }
            Step::Output => write!(f, "cannot use {what} for output")?,
            Step::Descriptors => write!(f, "cannot close inherited descriptors")?,
            Step::Groups => write!(f, "cannot set supplementary groups {what}")?,
            Step::Group => write!(f, "cannot become group {what}")?,
            Step::User => write!(f, "cannot become user {what}")?,
            Step::Privileges => write!(f, "cannot give up new privileges")?,
            Step::Namespace => write!(f, "cannot make a mount namespace of its own")?,
            Step::Mount => write!(f, "cannot mount on {what}")?,
            Step::Capabilities => write!(f, "cannot set its capabilities")?,
            Step::Landlock => write!(f, "cannot confine it with Landlock ({what})")?,
            Step::Seccomp => write!(f, "cannot refuse system calls ({what})")?,
            Step::Notify => write!(f, "cannot open {what} for its word of being ready")?,
            Step::WorkingDir => write!(f, "cannot enter working directory {what}")?,
            Step::Lookup => return write!(f, "{what}: not found in PATH"),
            Step::Exec => write!(f, "{what}")?,
            Step::Interpreter => return write!(f, "{what}: its interpreter or loader does not exist"),
        }
        write!(f, ": {}", describe(self.errno))
    }
}

/// The kernel's words for an errno, in our case.
pub(crate) fn describe(errno: i32) -> String {
    let text = Errno::from_raw(errno).desc();
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

/// The kernel's words are general; of a cgroup some of them mean one thing alone.
fn describe_cgroup(errno: i32) -> String {
    let (error, text) = (Errno::from_raw(errno), describe(errno));
    match error {
        Errno::EAGAIN => format!(
            "{text} ({error:?}): a cgroup above it allows no more below (cgroup.max.descendants, cgroup.max.depth)"
        ),
        Errno::EBUSY => {
            format!("{text} ({error:?}): it hands controllers to cgroups below it, so it may hold no process")
        }
        _ => format!("{text} ({error:?})"),
    }
}

/// The whole of `nave exec-stub FD`: never returns, as it becomes the service's program or ends. Its one argument,
/// the number of the orders' descriptor, is the last of the command line.
pub fn exec_stub_main() -> ! {
    let mut arguments = env::args_os();
    let Some(number) = arguments.next_back().and_then(|last| last.to_str()?.parse().ok()) else {
        crate::say!("exec-stub is for the keeper's use only: it takes one descriptor number");
        sys::exit_now(2)
    };
    if arguments.next_back().is_some_and(|word| word == ahead::AHEAD) {
        match sys::inherited(number) {
            Ok(channel) => ahead::wait(channel),
            Err(_) => sys::exit_now(2),
        }
    }
    let read = sys::inherited(number).and_then(|orders| {
        let orders = read_orders(orders)?;
        let channel = sys::inherited(orders.error_fd)?;
        Ok((orders, channel))
    });
    let Ok((orders, channel)) = read else {
        crate::say!("exec-stub is for the keeper's use only: descriptor {number} holds no orders");
        sys::exit_now(2)
    };
    become_program(&orders, channel)
}

/// A copy of a stub that waited, with the numbers of its own descriptors instead of the keeper's.
pub(crate) fn begin(orders: OwnedFd, channel: RawFd, output: [RawFd; 2]) -> ! {
    let [stdout_fd, stderr_fd] = output.map(RawFd::cast_unsigned);
    let Ok(orders) = read_orders(orders) else { sys::exit_now(2) };
    let Ok(channel) = sys::inherited(channel.cast_unsigned()) else { sys::exit_now(2) };
    become_program(&pb::ExecOrders { stdout_fd, stderr_fd, ..orders }, channel)
}

fn become_program(orders: &pb::ExecOrders, channel: OwnedFd) -> ! {
    // A keeper that died before it noted this process closes its end; then nothing may run.
    let mut word = [0; 1];
    if !matches!(sys::receive(channel.as_fd(), &mut word), Ok((1, _))) {
        sys::exit_now(0)
    }
    let failure = match prepare(orders, channel) {
        Ok((channel, spawn)) => Some((execute(spawn), channel)),
        Err((failure, channel)) => Some((failure, channel)),
    };
    if let Some((failure, channel)) = failure {
        let _ = sys::send(channel.as_fd(), &failure.encode(), &[]);
    }
    sys::exit_now(127)
}

/// The whole of `nave exec-check`: a command that looks at a running instance from inside, as its user, in its cgroup
/// and with its mounts. Reads [`pb::ExecOrders`] from its standard input and becomes the command, or says on its
/// standard error why it cannot and ends with 127.
pub fn exec_check_main() -> ! {
    let mut bytes = Vec::new();
    let read = io::stdin().read_to_end(&mut bytes);
    let orders = read.ok().and_then(|_| pb::ExecOrders::decode(&*bytes).ok());
    let Some(pb::ExecOrders { spawn: Some(spawn), beside, alone, .. }) = orders else {
        crate::say!("exec-check is for the agent's use only: its standard input holds no orders");
        sys::exit_now(2)
    };
    let place = if alone { Place::Alone } else { Place::Beside(beside.as_ref()) };
    let failure = match enter(&spawn, place) {
        Ok(()) => execute(&spawn),
        Err(failure) => failure,
    };
    crate::say!("{failure}");
    sys::exit_now(127)
}

/// Where a command of an instance stands.
enum Place<'a> {
    /// With the process that runs.
    Beside(Option<&'a pb::ProcessIdentity>),
    /// Before or after it.
    Alone,
}

/// Joins what the instance's own process was given, or is made the same.
fn enter(spawn: &pb::Spawn, place: Place<'_>) -> Result<(), Failure> {
    let none = pb::Sandbox::default();
    let sandbox = spawn.sandbox.as_ref().unwrap_or(&none);
    limits(spawn)?;
    enter_cgroups(spawn)?;
    manners(spawn)?;
    match place {
        Place::Beside(process) => sandbox::join_mounts(sandbox, process)?,
        Place::Alone => sandbox::make_mounts(sandbox)?,
    }
    File::open("/dev/null")
        .and_then(|null| sys::duplicate_onto(null.as_fd(), 0, false))
        .map_err(|error| Failure::new(Step::Descriptors, error, ""))?;
    sys::close_from(3).map_err(|error| Failure::new(Step::Descriptors, error, ""))?;
    sys::reset_signals().map_err(|error| Failure::new(Step::Session, error, ""))?;
    user(spawn, sandbox)?;
    working_dir(spawn)?;
    sandbox::restrict_files(sandbox)?;
    sandbox::restrict_calls(sandbox)
}

fn read_orders(memory: OwnedFd) -> io::Result<pb::ExecOrders> {
    let mut bytes = Vec::new();
    File::from(memory).read_to_end(&mut bytes)?;
    Ok(pb::ExecOrders::decode(&*bytes).map_err(|_| io::ErrorKind::InvalidData)?)
}

type Prepared<'a> = Result<(OwnedFd, &'a pb::Spawn), (Failure, OwnedFd)>;

/// All that does not depend on who the program runs as, then who it runs as, then where.
fn prepare(orders: &pb::ExecOrders, channel: OwnedFd) -> Prepared<'_> {
    let Some(spawn) = &orders.spawn else {
        return Err((Failure::new(Step::Orders, Errno::EINVAL, "(no spawn in them)"), channel));
    };
    let channel = standard_descriptors(orders, channel)?;
    let none = pb::Sandbox::default();
    let sandbox = spawn.sandbox.as_ref().unwrap_or(&none);
    let prepared = surroundings(spawn)
        .and_then(|()| sandbox::make_mounts(sandbox))
        .and_then(|()| notify_fifo(spawn))
        .and_then(|fifo| user(spawn, sandbox).map(|()| fifo))
        .and_then(|fifo| working_dir(spawn).map(|()| fifo));
    let (fifo, channel) = match prepared {
        Ok(None) => (None, channel),
        Ok(Some(fifo)) => match sys::duplicate_above(&channel, NOTIFY_FD_MAX + 1) {
            Ok(high) => {
                // Now, since its number may be the one that the program wants.
                drop(channel);
                (Some(fifo), high)
            }
            Err(error) => return Err((Failure::new(Step::Descriptors, error, ""), channel)),
        },
        Err(failure) => return Err((failure, channel)),
    };
    let confined = fifo
        .map_or(Ok(()), |fifo| notify_descriptor(spawn, fifo))
        .and_then(|()| sandbox::restrict_files(sandbox))
        .and_then(|()| sandbox::restrict_calls(sandbox));
    match confined {
        Ok(()) => Ok((channel, spawn)),
        Err(failure) => Err((failure, channel)),
    }
}

/// Opened for both ways, so that it never blocks nor breaks, whoever reads or does not.
fn notify_fifo(spawn: &pb::Spawn) -> Result<Option<OwnedFd>, Failure> {
    if spawn.notify_fifo.is_empty() {
        return Ok(None);
    }
    let failed = |error: io::Error| Failure::new(Step::Notify, error, &spawn.notify_fifo);
    let fifo = OpenOptions::new().read(true).write(true).open(&spawn.notify_fifo).map_err(failed)?;
    sys::duplicate_above(fifo, NOTIFY_FD_MAX + 1).map(Some).map_err(failed)
}

/// Under the number that the program expects, which may have been the channel's.
fn notify_descriptor(spawn: &pb::Spawn, fifo: OwnedFd) -> Result<(), Failure> {
    let number = i32::try_from(spawn.notify_fd).ok().filter(|number| (3..=NOTIFY_FD_MAX).contains(number));
    let placed = match number {
        Some(number) => sys::duplicate_onto(fifo.as_fd(), number, false),
        None => Err(io::Error::from_raw_os_error(libc::EBADF)),
    };
    placed.map_err(|error| Failure::new(Step::Notify, error, &spawn.notify_fifo))
}

/// 0: /dev/null, 1 and 2: the FIFOs, 3: the channel until exec, nothing else.
fn standard_descriptors(orders: &pb::ExecOrders, channel: OwnedFd) -> Result<OwnedFd, (Failure, OwnedFd)> {
    let open = || -> Result<(OwnedFd, OwnedFd, OwnedFd), Failure> {
        let output = |number| {
            sys::inherited(number)
                .and_then(|fd| sys::duplicate_above(fd, 10))
                .map_err(|error| Failure::new(Step::Output, error, "the FIFOs"))
        };
        let null = File::open("/dev/null")
            .and_then(|null| sys::duplicate_above(null, 10))
            .map_err(|error| Failure::new(Step::Output, error, "/dev/null"))?;
        Ok((null, output(orders.stdout_fd)?, output(orders.stderr_fd)?))
    };
    let (null, stdout, stderr) = match open() {
        Ok(all) => all,
        Err(failure) => return Err((failure, channel)),
    };
    let high = match sys::duplicate_above(&channel, 10) {
        Ok(high) => high,
        Err(error) => return Err((Failure::new(Step::Descriptors, error, ""), channel)),
    };
    // From here on only the three standard numbers and 3 stay open.
    drop(channel);
    let arranged = sys::duplicate_onto(null.as_fd(), 0, false)
        .and_then(|()| sys::duplicate_onto(stdout.as_fd(), 1, false))
        .and_then(|()| sys::duplicate_onto(stderr.as_fd(), 2, false))
        .and_then(|()| sys::duplicate_onto(high.as_fd(), 3, true));
    drop((null, stdout, stderr));
    match arranged {
        Ok(()) => drop(high),
        Err(error) => return Err((Failure::new(Step::Descriptors, error, ""), high)),
    }
    let Ok(channel) = sys::inherited(3) else { sys::exit_now(127) };
    match sys::close_from(4) {
        Ok(()) => Ok(channel),
        Err(error) => Err((Failure::new(Step::Descriptors, error, ""), channel)),
    }
}

fn surroundings(spawn: &pb::Spawn) -> Result<(), Failure> {
    nix::unistd::setsid().map_err(|error| Failure::new(Step::Session, error, ""))?;
    sys::reset_signals().map_err(|error| Failure::new(Step::Session, error, ""))?;
    limits(spawn)?;
    for file in &spawn.cgroup_files {
        if holds(&file.path, &file.value) {
            continue;
        }
        if let Err(error) = write_file(&file.path, &file.value)
            && file.required
        {
            return Err(Failure::new(Step::CgroupFile, error, format!("{:?} to {}", file.value, file.path)));
        }
    }
    enter_cgroups(spawn)?;
    manners(spawn)
}

fn limits(spawn: &pb::Spawn) -> Result<(), Failure> {
    let score = spawn.oom_score_adj.to_string();
    write_file("/proc/self/oom_score_adj", &score)
        .map_err(|error| Failure::new(Step::OomScore, error, &score))?;
    for limit in &spawn.rlimits {
        sys::set_resource_limit(limit.resource, limit.soft, limit.hard).map_err(|error| {
            Failure::new(Step::Limit, error, format!("{} to {}:{}", limit.resource, limit.soft, limit.hard))
        })?;
    }
    Ok(())
}

fn manners(spawn: &pb::Spawn) -> Result<(), Failure> {
    // Late: on a busy host the steps before are done sooner as nice as the keeper is.
    sys::set_nice(spawn.nice).map_err(|error| Failure::new(Step::Nice, error, spawn.nice.to_string()))?;
    let mask = if spawn.umask == 0 { 0o022 } else { spawn.umask & 0o777 };
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mask));
    Ok(())
}

/// Moving a process to another cgroup makes the kernel wait for all CPUs, some 7 ms. It does not for a thread that moves
/// itself, which is all of us, and not for a child that is made in its cgroup, as we were where the kernel can do that.
fn enter_cgroups(spawn: &pb::Spawn) -> Result<(), Failure> {
    for dir in &spawn.cgroup1 {
        write_file(Path::new(dir).join("tasks"), "0")
            .map_err(|error| Failure::new(Step::Cgroup, error, dir))?;
    }
    let dir = &spawn.cgroup2;
    if dir.is_empty() || crate::cgroup::is_in(dir, std::process::id()) {
        return Ok(());
    }
    write_file(Path::new(dir).join("cgroup.procs"), "0")
        .map_err(|error| Failure::new(Step::Cgroup, error, dir))
}

fn user(spawn: &pb::Spawn, sandbox: &pb::Sandbox) -> Result<(), Failure> {
    sandbox::bound_capabilities(sandbox)?;
    if spawn.set_user {
        let groups: Vec<Gid> = spawn.groups.iter().copied().map(Gid::from_raw).collect();
        let (uid, gid) = (Uid::from_raw(spawn.uid), Gid::from_raw(spawn.gid));
        let named = || format!("{:?}", spawn.groups);
        nix::unistd::setgroups(&groups).map_err(|error| Failure::new(Step::Groups, error, named()))?;
        nix::unistd::setresgid(gid, gid, gid)
            .map_err(|error| Failure::new(Step::Group, error, spawn.gid.to_string()))?;
        nix::unistd::setresuid(uid, uid, uid)
            .map_err(|error| Failure::new(Step::User, error, spawn.uid.to_string()))?;
    }
    sandbox::take_capabilities(sandbox)?;
    if spawn.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().map_err(|error| Failure::new(Step::Privileges, error, ""))?;
    }
    Ok(())
}

/// As the user that the program runs as, so that what it may not enter is refused here.
fn working_dir(spawn: &pb::Spawn) -> Result<(), Failure> {
    let dir = if spawn.working_dir.is_empty() { "/" } else { &spawn.working_dir };
    env::set_current_dir(dir).map_err(|error| Failure::new(Step::WorkingDir, error, dir))
}

/// Returns only with the reason why the program does not run.
fn execute(spawn: &pb::Spawn) -> Failure {
    let strings = |list: &[String]| -> Result<Vec<CString>, Failure> {
        let each = list.iter().map(|text| CString::new(text.as_str()));
        each.collect::<Result<_, _>>()
            .map_err(|_| Failure::new(Step::Orders, Errno::EINVAL, "(a zero byte in argv or env)"))
    };
    let (argv, env) = match (strings(&spawn.argv), strings(&spawn.env)) {
        (Ok(argv), Ok(env)) if !argv.is_empty() => (argv, env),
        (Err(failure), _) | (_, Err(failure)) => return failure,
        (Ok(_), Ok(_)) => return Failure::new(Step::Orders, Errno::EINVAL, "(argv is empty)"),
    };
    let name = &argv[0];
    if name.as_bytes().contains(&b'/') {
        return attempt(name, &argv, &env);
    }
    let path = spawn.env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or("/usr/bin:/bin");
    let mut refused = None;
    for dir in path.split(':').map(|dir| if dir.is_empty() { "." } else { dir }) {
        let candidate = Path::new(dir).join(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let Ok(candidate) = CString::new(candidate.as_os_str().as_bytes()) else { continue };
        let failure = attempt(&candidate, &argv, &env);
        match failure.errno {
            // As execvp: look on, but remember that there was one.
            libc::EACCES => refused = Some(failure),
            libc::ENOENT | libc::ENOTDIR if failure.step == Step::Exec => {}
            _ => return failure,
        }
    }
    refused.unwrap_or_else(|| Failure::new(Step::Lookup, Errno::ENOENT, name.to_string_lossy().into_owned()))
}

fn attempt(program: &CStr, argv: &[CString], env: &[CString]) -> Failure {
    let Err(error) = nix::unistd::execve(program, argv, env);
    let path = program.to_string_lossy().into_owned();
    // ENOENT about a file that is there means the file it asks for.
    let step =
        if error == Errno::ENOENT && Path::new(&path).exists() { Step::Interpreter } else { Step::Exec };
    Failure::new(step, error, path)
}

/// Whether a cgroup file says so already. To say so once more may cost milliseconds: the kernel takes a CPU quota anew.
fn holds(path: &str, value: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.trim_end() == value)
}

/// Cgroup and proc files want the value in one write and exist already.
fn write_file(path: impl AsRef<Path>, value: &str) -> io::Result<()> {
    use std::io::Write as _;
    let mut file: fs::File = OpenOptions::new().write(true).open(path)?;
    file.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_channel_and_read_well() {
        let cases = [
            (
                Failure::new(Step::Exec, Errno::ENOENT, "/usr/bin/nope"),
                "/usr/bin/nope: no such file or directory",
            ),
            (Failure::new(Step::Lookup, Errno::ENOENT, "nope"), "nope: not found in PATH"),
            (
                Failure::new(Step::WorkingDir, Errno::EACCES, "/root"),
                "cannot enter working directory /root: permission denied",
            ),
            (
                Failure::new(Step::CgroupMake, Errno::EAGAIN, "/c/web/i-1-1"),
                "cannot make cgroup /c/web/i-1-1: try again (EAGAIN): a cgroup above it allows no more below \
                 (cgroup.max.descendants, cgroup.max.depth)",
            ),
            (
                Failure::new(Step::Cgroup, Errno::ENOENT, "/c/web/i-1-1"),
                "cannot enter cgroup /c/web/i-1-1: no such file or directory (ENOENT)",
            ),
        ];
        for (failure, text) in cases {
            assert_eq!(Failure::decode(&failure.encode()).as_ref(), Some(&failure));
            assert_eq!(failure.to_string(), text);
        }
        assert_eq!(Failure::decode(b""), None);
    }
}
