//! Promise: a process finds beside its command what its manifest names, and what is secret stays on its host.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nave_tests::cluster::SOON;
use nave_tests::{Cluster, Setup, eventually};

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

    let secret = std::fs::metadata(after.join("secrets/password")).expect("it is there");
    assert_eq!(secret.permissions().mode() & 0o777, 0o400);
    if nave_tests::machine::is_root() {
        let folder = std::fs::metadata(&after).expect("it is there");
        assert_eq!(folder.permissions().mode() & 0o777, 0o700);
        assert!(folder.uid() != 0 && folder.uid() == secret.uid(), "the service's own user");
    }
    for told in [&["status", "db"][..], &["events"], &["services", "-o", "json"], &["logs", "db"]] {
        assert!(!cluster.nave(told).text().contains(SECRET), "{told:?} tells it");
    }
    let found = files_with(cluster.dir(), SECRET.as_bytes());
    assert_eq!(found, [after.join("secrets/password"), given.join("password")], "and no other file");

    // What is not there is the reason, by its name.
    std::fs::remove_file(given.join("password")).expect("removed");
    cluster.nave(&["restart", "db"]).expect(0);
    eventually("the missing secret is the reason", SOON, || {
        cluster
            .ps("db")
            .iter()
            .any(|row| row["reason"].as_str().is_some_and(|why| why.contains("secret password:")))
    });
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
