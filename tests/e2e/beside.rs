//! Promise: a process finds beside its command what its manifest names, and what is secret stays on its host.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;

use crate::between_hosts::ask;
use crate::deploy_and_serve::pid;
use crate::manifests::web_with;

const SECRET: &str = "hunter2-is-not-for-you";

fn manifest(dir: &Path, version: u32) -> String {
    let at = |name: &str| dir.join(name).display().to_string();
    format!(
        r#"
name = "db"
command = ["sh", "-c", '''
cat "$NAVE_FILES/conf/app.toml" "$NAVE_FILES/taken"
echo "secret of $(wc -c < "$NAVE_SECRETS/password") bytes"
echo "variables $FROM_FILE $BOTH"
echo start >> "$NAVE_DATA/starts"
echo "start $(wc -l < "$NAVE_DATA/starts") of version {version}"
exec sleep infinity
''']
env_file = ["{env}"]
env = {{ BOTH = "manifest" }}
data = true
secrets = {{ password = "{secret}" }}

[ports.http]
protocol = "http"

[[file]]
path = "conf/app.toml"
content = """
port = ${{PORT}}
of = "${{NAVE_SERVICE}}.${{NAVE_ORDINAL}}"
"""
mode = "0640"

[[file]]
path = "taken"
source = "{source}"
template = false
"#,
        env = at("env"),
        secret = at("password"),
        source = at("source"),
    )
}

#[test]
fn files_variables_secrets_and_data_are_there_and_the_secret_is_nowhere_else() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let given = cluster.dir().join("given");
    std::fs::create_dir(&given).expect("a folder");
    for (name, text) in [
        ("env", "# of the host\nFROM_FILE='as it is'\nBOTH=file\n"),
        ("password", SECRET),
        ("source", "verbatim ${PORT}\n"),
    ] {
        std::fs::write(given.join(name), text).expect("written");
    }
    cluster.apply(&manifest(&given, 1), &["--wait"]).expect(0);
    let row = cluster.wait_ready("db", 1).remove(0);
    let said = |what: &str| {
        eventually(what, SOON, || cluster.nave(&["logs", "db"]).stdout.contains(what));
    };
    said(&format!("port = {}", row["ports"]["http"]));
    said("of = \"db.0\"");
    said("verbatim ${PORT}");
    said(&format!("secret of {} bytes", SECRET.len()));
    said("variables as it is manifest");
    said("start 1 of version 1");

    // A restart finds the same data, and so does the next version.
    let run = |row: &serde_json::Value| {
        let id = row["id"].as_str().expect("an id").to_owned();
        cluster.agents[0].dir.join("data/run").join(id)
    };
    let before = run(&row);
    assert!(before.is_dir());
    cluster.apply(&manifest(&given, 2), &["--wait"]).expect(0);
    said("start 2 of version 2");
    let row = cluster.wait_ready("db", 1).remove(0);
    let after = run(&row);
    eventually("what was provided for the old instance goes with it", SOON, || !before.exists());

    let pid = row["pid"].as_u64().expect("it runs");
    let secrets = environment(pid, "NAVE_SECRETS");
    let secret = std::fs::metadata(secrets.join("password")).expect("it is there");
    assert_eq!(secret.permissions().mode() & 0o777, 0o400);
    if nave_tests::machine::is_root() {
        for folder in [&after, &secrets] {
            let folder = std::fs::metadata(folder).expect("it is there");
            assert_eq!(folder.permissions().mode() & 0o777, 0o700);
            assert!(folder.uid() != 0 && folder.uid() == secret.uid(), "the service's own user");
        }
    }
    for told in [&["status", "db"][..], &["events"], &["services", "-o", "json"], &["logs", "db"]] {
        assert!(!cluster.nave(told).text().contains(SECRET), "{told:?} tells it");
    }
    let found = files_with(cluster.dir(), SECRET.as_bytes());
    // In memory where this machine has any, else beside the agent's other data.
    let on_disk = secrets.starts_with(cluster.dir()).then(|| secrets.join("password"));
    let has_memory = nix::sys::statfs::statfs("/dev/shm")
        .is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
    assert!(on_disk.is_none() || !has_memory, "{secrets:?} is on a disk");
    let expected: Vec<PathBuf> = [given.join("password")].into_iter().chain(on_disk).collect();
    assert_eq!(found, expected, "and no other file");

    // It goes with the instance.
    cluster.nave(&["restart", "db"]).expect(0);
    eventually("the secrets of the old instance are gone", SOON, || !secrets.exists());
    said("start 3 of version 2");
    let row = cluster.wait_ready("db", 1).remove(0);

    // What is not there is the reason, by its name, and nothing is stopped for it.
    let (here, away) = (given.join("password"), given.join("away"));
    std::fs::rename(&here, &away).expect("moved");
    cluster.nave(&["restart", "db"]).expect(0);
    eventually("the missing secret is the reason", SOON, || {
        let status = cluster.nave(&["status", "db"]).stdout;
        status.contains("cannot fetch what version 4 needs: secret password:")
    });
    let still = cluster.wait_ready("db", 1).remove(0);
    assert_eq!((&still["id"], &still["pid"]), (&row["id"], &row["pid"]), "it runs on");
    std::fs::rename(&away, &here).expect("moved back");
    said("start 4 of version 2");

    // Applied again it has another user, and its data is that user's own.
    cluster.nave(&["delete", "db"]).expect(0);
    eventually("it is gone", SOON, || !cluster.nave(&["services"]).stdout.contains("db"));
    cluster.apply(&manifest(&given, 3), &["--wait"]).expect(0);
    said("start 5 of version 3");
}

fn environment(pid: u64, name: &str) -> PathBuf {
    let text = std::fs::read_to_string(format!("/proc/{pid}/environ")).expect("it runs");
    let value = text.split('\0').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    PathBuf::from(value.expect("it is told"))
}

/// All regular files below with these bytes in them, sorted.
fn files_with(dir: &Path, needle: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                Ok(kind) if kind.is_file() => {
                    let bytes = std::fs::read(&path).unwrap_or_default();
                    if bytes.windows(needle.len()).any(|part| part == needle) {
                        found.push(path);
                    }
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
    found.sort();
    found
}

/// Serves one file over HTTP until it goes out of scope; counts how often.
struct Shop {
    port: u16,
    asked: Arc<AtomicUsize>,
    served: Arc<AtomicUsize>,
    /// While it is not set, only half of it.
    open: Arc<AtomicBool>,
}

impl Shop {
    fn open(content: Vec<u8>) -> Self {
        let shop = Self::closed(content);
        shop.let_go();
        shop
    }

    /// Nobody gets the second half before [`Shop::let_go`].
    fn closed(content: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (asked, served) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let open = Arc::new(AtomicBool::new(false));
        let (begun, counter, is_open) = (asked.clone(), served.clone(), open.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut request = [0; 4096];
                let Ok(_) = stream.read(&mut request) else { continue };
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    content.len()
                );
                begun.fetch_add(1, Ordering::SeqCst);
                let (first, second) = content.split_at(content.len() / 2);
                let _gone = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(first));
                while !is_open.load(Ordering::SeqCst) {
                    nave_tests::wait::pause(Duration::from_millis(10));
                }
                let _gone = stream.write_all(second);
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { port, asked, served, open }
    }

    fn let_go(&self) {
        self.open.store(true, Ordering::SeqCst);
    }

    fn served(&self) -> usize {
        self.served.load(Ordering::SeqCst)
    }
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum runs");
    String::from_utf8_lossy(&output.stdout).split(' ').next().expect("a sum").to_owned()
}

/// The processes that fetch for this agent. What they fetch from is nowhere for others to read.
fn fetchers(agent: u32, url: &str) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("it is there").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let fetches = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        let is_its = line.contains("artifact-stub\0fetch") && parent == Some(agent);
        assert!(!is_its || !line.contains(url), "its arguments name the URL: {line}");
        is_its
    };
    pids.filter(fetches).collect()
}

#[test]
fn artifacts_are_fetched_once_unpacked_and_refused_when_they_are_not_what_was_meant() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    // Below /tmp itself: whoever fetches belongs to nobody and must get there.
    let given = tempfile::Builder::new().prefix("nave-artifacts").tempdir().expect("a folder");
    std::fs::set_permissions(given.path(), std::fs::Permissions::from_mode(0o755)).expect("opened");
    let tool = given.path().join("tool");
    std::fs::write(&tool, "#!/bin/sh\necho the tool ran as $(id -u)\n").expect("written");
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).expect("executable");
    let packed = given.path().join("packed.tar.gz");
    let tar = Command::new("tar").arg("-C").arg(given.path()).arg("-czf").arg(&packed).arg("tool").status();
    assert!(tar.expect("tar runs").success());
    let shop = Shop::open(std::fs::read(&packed).expect("read"));
    let manifest = |count: u32, sum: &str| {
        format!(
            r#"
name = "user"
command = ["sh", "-c", '"$NAVE_ARTIFACTS/plain"; "$NAVE_ARTIFACTS/packed/tool"; exec sleep infinity']
count = {count}
restart.budget = "2 in 1m"
update.auto_revert = false

[[artifact]]
name = "plain"
url = "file://{}"
sha256 = "{}"

[[artifact]]
name = "packed"
url = "http://127.0.0.1:{}/packed.tar.gz"
sha256 = "{sum}"
"#,
            tool.display(),
            sha256(&tool),
            shop.port,
        )
    };
    let good = sha256(&packed);
    cluster.apply(&manifest(2, &good), &["--wait"]).expect(0);
    cluster.wait_ready("user", 2);
    eventually("both have run both", SOON, || {
        cluster.nave(&["logs", "user"]).stdout.matches("the tool ran as").count() == 4
    });
    assert_eq!(shop.served(), 1, "two instances, one host: fetched once");
    let cached = cluster.agents[0].dir.join(format!("data/cache/{good}.tar.gz/tree/tool"));
    let found = std::fs::metadata(&cached).expect("it is in the cache");
    assert_eq!(found.permissions().mode() & 0o7777, 0o755);
    assert_eq!(found.uid(), nix::unistd::geteuid().as_raw(), "and services cannot change it");

    let bad = "0".repeat(64);
    cluster.apply(&manifest(2, &bad), &[]).expect(0);
    eventually("the checksums are the reason", SOON, || {
        let rows = cluster.ps("user");
        rows.iter().any(|row| {
            row["reason"].as_str().is_some_and(|why| why.contains("artifact packed:") && why.contains(&good))
        })
    });
    let still = cluster.ps("user").iter().filter(|row| row["version"] == 1 && row["ready"] == true).count();
    assert_eq!(still, 2, "what ran goes on");

    // One that never comes, from somebody who takes the call and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let late = format!(
        "name = \"late\"\ncommand = [\"true\"]\n[[artifact]]\nname = \"x\"\nurl = \"http://{}/x\"\nsha256 = \"{bad}\"\n",
        silent.local_addr().expect("an address")
    );
    cluster.apply(&late, &[]).expect(0);
    eventually("it is being fetched", SOON, || {
        cluster.ps("late").iter().any(|row| row["reason"] == "fetches what it needs")
    });
    // An agent that ends leaves nobody behind who fetches, and the next one begins anew.
    let url = format!("http://{}/x", silent.local_addr().expect("an address"));
    let fetching = |agent: u32| fetchers(agent, &url).first().copied();
    let before = cluster.agents[0].agent_pid();
    let fetcher = eventually_some("somebody who fetches it", SOON, || fetching(before));
    send(before, Signal::SIGTERM);
    eventually("the agent has ended", SOON, || !alive(before));
    assert!(!alive(fetcher), "what it had begun ended with it");
    let next = cluster.agents[0].agent_pid();
    eventually("the next one fetches", SOON, || fetching(next).is_some());
    cluster.nave(&["delete", "late"]).expect(0);
    eventually("nobody waits for the end of that", SOON, || cluster.ps("late").is_empty());
    let cache = std::fs::read_dir(cluster.agents[0].dir.join("data/cache")).expect("it is there");
    let names: Vec<String> = cache.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    assert!(!names.iter().any(|name| name.contains(&bad)), "no half of it is left: {names:?}");
}

#[test]
fn one_that_has_to_stop_first_runs_on_until_its_successor_can_start() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 2 });
    let given = tempfile::tempdir().expect("a folder");
    let file = given.path().join("tool");
    std::fs::write(&file, "of some size\n".repeat(100)).expect("written");
    let shop = Shop::closed(std::fs::read(&file).expect("read"));
    let port = nave_tests::machine::free_ports();
    let fixed = |args: &str, tables: &str| {
        let port = format!("protocol = \"http\"\nport = {port}\n");
        web_with("web", 1, args, tables).replace("protocol = \"http\"\n", &port)
    };
    let with_tool = |greeting: &str, sum: &str, more: &str| {
        let url = format!("http://127.0.0.1:{}/tool", shop.port);
        let tool = format!("[[artifact]]\nname = \"tool\"\nurl = \"{url}\"\nsha256 = \"{sum}\"\n{more}");
        fixed(&format!("--greeting {greeting}"), &tool)
    };
    cluster.apply(&fixed("--greeting first", ""), &["--wait"]).expect(0);
    let first = cluster.wait_ready("web", 1).remove(0);
    let address = cluster.address("web").to_string();
    let answers = |greeting: &str| ask(&address).is_ok_and(|answer| answer.contains(greeting));
    eventually("the first answers", SOON, || answers("first"));

    let good = sha256(&file);
    cluster.apply(&with_tool("second", &good, ""), &[]).expect(0);
    eventually("it is said what is waited for", SOON, || {
        let status = cluster.nave(&["status", "web"]).stdout;
        status.contains("runs on until") && status.contains("what version 2 needs")
    });
    let rows = cluster.ps("web");
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert!(pid(&rows[0]) == pid(&first) && rows[0]["ready"] == true, "{rows:?}");
    assert!(answers("first"), "while half of the download is missing");

    // An agent that ends waits for no download, and the next one begins it anew.
    eventually("it is being fetched", SOON, || shop.asked.load(Ordering::SeqCst) == 1);
    let host = first["host"].as_str().expect("a name");
    let agent = cluster.agents.iter().find(|agent| agent.name == host).expect("one of them");
    let before = agent.agent_pid();
    send(before, Signal::SIGTERM);
    eventually("another agent", SOON, || {
        agent.pid_file("nave.pid").is_some_and(|now| now != before && alive(now))
    });
    assert!(answers("first"));
    shop.let_go();
    eventually("the second answers", SOON, || answers("second"));
    let second = cluster.wait_ready("web", 1).remove(0);
    assert_eq!(second["host"], first["host"], "where it was fetched");
    let kinds = || -> Vec<String> {
        let events = cluster.json(&["events", "--service", "web"]);
        let kinds = events.as_array().expect("a list").iter().filter_map(|event| event["kind"].as_str());
        kinds.map(str::to_owned).collect()
    };
    let at = |kind: &str| kinds().iter().position(|other| other == kind);
    assert!(
        at("instance_fetched").is_some() && at("instance_fetched") < at("instance_stopping"),
        "{:?}",
        kinds()
    );

    let bad = with_tool("third", &"0".repeat(64), "[update]\nprogress_deadline = \"3s\"\n");
    let said = cluster.apply(&bad, &["--wait"]).expect(1).text();
    for part in ["reverted to version 2", "cannot fetch what version 3 needs: artifact tool:", &good] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(answers("second"));
    assert_eq!(pid(&cluster.wait_ready("web", 1)[0]), pid(&second));
    assert_eq!(kinds().iter().filter(|kind| *kind == "instance_stopping").count(), 1, "only the first");
}
