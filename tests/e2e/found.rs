//! Promise: a service is one name away: by its environment, by DNS and by `nave url`, also while no hub is there.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};

use nave_tests::cluster::{Role, SOON};
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use serde_json::Value;

use crate::deploy_and_serve::get;
use crate::manifests::web_with;

/// Looks for `web` as any program would, by its libc, and says what it found.
const CALLER: &str = r#"
import http.server, json, os, socket, urllib.request
def names(host):
    try:
        return sorted({a[4][0] for a in socket.getaddrinfo(host, 80, proto=socket.IPPROTO_TCP)})
    except OSError as error:
        return str(error)
def page(url):
    try:
        return urllib.request.urlopen(url, timeout=5).read().decode().strip()
    except OSError as error:
        return str(error)
class Look(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        env = {name: value for name, value in os.environ.items() if name.startswith("WEB_")}
        found = {"env": env, "web": names("web.nave.internal"), "nobody": names("nobody.nave.internal"),
                 "first": names("0.web.nave.internal"), "third": names("2.web.nave.internal"),
                 "by_ordinal": [page("http://0.web.nave.internal/"), page("http://1.web.nave.internal/")],
                 "by_env": page(os.environ["WEB_URL"] + "/"), "by_name": page("http://web.nave.internal/")}
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Look).serve_forever()
"#;

fn caller() -> String {
    format!(
        "name = \"caller\"\ncommand = [\"python3\", \"-c\", '''{CALLER}''']\nneeds = [\"web\"]\n\
         env = {{ WEB_MINE = \"kept\" }}\n\n[ports.http]\nprotocol = \"http\"\n\n[health]\ntcp = true\ninterval = \"100ms\"\n"
    )
}

fn look(cluster: &Cluster) -> Option<Value> {
    let port = cluster.ps("caller").first()?["ports"]["http"].as_u64()?;
    serde_json::from_str(&get(port, "/")?).ok()
}

#[test]
fn by_environment_by_dns_and_by_the_command_line_with_and_without_a_hub() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&web_with("web", 2, "--greeting hi", ""), &["--wait"]).expect(0);
    cluster.apply(&caller(), &["--wait"]).expect(0);
    let port = cluster.wait_ready("caller", 1)[0]["ports"]["http"].as_u64().expect("a port");

    let url = cluster.url("web");
    let found = look(&cluster).expect("the caller answers");
    assert_eq!(found["env"]["WEB_URL"], url.as_str(), "{found}");
    assert_eq!(url, format!("http://{}", found["env"]["WEB_ADDR"].as_str().expect("an address")));
    assert_eq!(found["env"]["WEB_MINE"], "kept", "the manifest's own");
    assert!(found["by_env"].as_str().is_some_and(|said| said.starts_with("hi from i-")), "{found}");
    check_names(&found, &url);
    if geteuid().is_root() {
        (0..5).for_each(|_| check_singles(&cluster, &look(&cluster).expect("the caller answers")));
    }
    let behind = cluster.json(&["endpoints", "web"]);
    assert_eq!(behind.as_array().map(Vec::len), Some(2), "{behind}");

    let before = found;
    let data = cluster.agents[0].dir.join("data");
    eventually("the directory is on disk", SOON, || {
        std::fs::read(data.join("directory"))
            .is_ok_and(|bytes| bytes.windows(6).filter(|bytes| bytes == b"caller").count() == 2)
    });
    cluster.members.iter_mut().for_each(Role::kill);
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGKILL);
    eventually("another agent", SOON, || {
        cluster.agents[0].pid_file("nave.pid").is_some_and(|now| now != agent && alive(now))
    });
    eventually_some("endpoints are known without a hub", SOON, || {
        let found: Value = serde_json::from_str(&get(port, "/")?).ok()?;
        found["by_env"].as_str()?.starts_with("hi from i-").then_some(())
    });
    let found = eventually_some("names are answered again", SOON, || {
        let again: Value = serde_json::from_str(&get(port, "/")?).ok()?;
        (!geteuid().is_root() || again["web"].is_array()).then_some(again)
    });
    check_names(&found, &url);
    let singles = |found: &Value| (found["first"].clone(), found["by_ordinal"].clone());
    if geteuid().is_root() {
        assert_eq!(singles(&found), singles(&before), "as before, without a hub");
    }
}

/// The address of `web`, as a resolver asks for it after an answer that was too long.
fn over_tcp(service: &str) -> Option<Vec<u8>> {
    let prefix = service.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["web", "nave", "internal"] {
        query.push(u8::try_from(label.len()).ok()?);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let mut stream = TcpStream::connect(format!("{prefix}.0.1:53")).ok()?;
    stream.set_read_timeout(Some(SOON)).ok()?;
    stream.write_all(&u16::try_from(query.len()).ok()?.to_be_bytes()).ok()?;
    stream.write_all(&query).ok()?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).ok()?;
    Some(answer)
}

/// Names need an agent that is root: it listens on port 53 and gives its services a resolver.
fn check_names(found: &Value, url: &str) {
    if !geteuid().is_root() {
        return;
    }
    let address = url.trim_start_matches("http://").split(':').next().expect("an address");
    assert_eq!(found["web"], serde_json::json!([address]), "{found}");
    assert!(found["nobody"].is_string(), "no such name: {found}");
    let asked_by_tcp = over_tcp(address).expect("the name server answers over TCP too");
    assert!(asked_by_tcp.ends_with(&address.parse::<Ipv4Addr>().expect("an address").octets()));
    assert!(found["by_name"].as_str().is_some_and(|said| said.starts_with("hi from i-")), "{found}");
    assert!(found["third"].is_string(), "there are two: {found}");
    assert!(found["first"].is_array() && found["first"] != found["web"], "an address of its own: {found}");
}

/// Who answers to the name of each ordinal: always the same instance.
fn check_singles(cluster: &Cluster, found: &Value) {
    let said: Vec<String> = (0..2)
        .map(|ordinal| {
            let rows = cluster.ps("web");
            let row = rows.iter().find(|row| row["ordinal"] == ordinal).expect("an instance");
            format!("hi from {}", row["id"].as_str().expect("an id"))
        })
        .collect();
    for (ordinal, said) in said.iter().enumerate() {
        let heard = found["by_ordinal"][ordinal].as_str().unwrap_or_default();
        assert!(heard.starts_with(said), "{said} is not {heard}");
    }
}
