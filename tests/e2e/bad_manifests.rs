//! Promise: a manifest that cannot work is refused before anything changes, with the place and the way out.

use nave_tests::{Cluster, Setup};

#[test]
fn each_is_refused_with_its_place_and_a_hint() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let cases: [(&str, &[&str]); 9] = [
        ("name = \"web\"\ncomand = [\"true\"]\n", &[":2:1", "comand", "command"]),
        ("name = \"Web!\"\ncommand = [\"true\"]\n", &[":1:8", "a-z, 0-9"]),
        ("name = \"web\"\ncommand = []\n", &[":2:", "command"]),
        ("name = \"web\"\ncommand = [\"true\"]\ncount = 2\nper_host = true\n", &["per_host", "count"]),
        ("name = \"web\"\ncommand = [\"true\"]\nneeds = [\"web\"]\n", &["needs"]),
        ("name = \"web\"\ncommand = [\"true\"]\n[ports.dns]\nprotocol = \"udp\"\n", &["udp"]),
        ("name = \"web\"\ncommand = [\"true\"]\n[health]\nintervall = \"1s\"\n", &["intervall", "interval"]),
        ("name = \"web\"\ncommand = [\"true\"]\n[stop]\ngrace = \"soon\"\n", &[":4:", "soon"]),
        ("name = \"web\ncommand = [\"true\"]\n", &[":1:"]),
    ];
    for (text, words) in cases {
        let output = cluster.apply(text, &[]);
        assert_eq!(output.code, 2, "{text}\n{}", output.text());
        for word in words {
            assert!(output.stderr.contains(word), "{text}\nlacks {word:?}:\n{}", output.stderr);
        }
    }
    assert_eq!(cluster.json(&["services"]).as_array().map(Vec::len), Some(0), "nothing was accepted");
}

#[test]
fn cycles_duplicates_and_giants_are_refused() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 0 });
    cluster.apply("name = \"a\"\ncommand = [\"true\"]\ncount = 0\nneeds = [\"b\"]\n", &[]).expect(0);
    let cycle =
        cluster.apply("name = \"b\"\ncommand = [\"true\"]\ncount = 0\nneeds = [\"a\"]\n", &[]).expect(1);
    assert!(cycle.stderr.contains('a') && cycle.stderr.contains("cycle"), "{}", cycle.stderr);

    let dir = tempfile::tempdir().expect("a folder");
    for file in ["one.toml", "two.toml"] {
        std::fs::write(dir.path().join(file), "name = \"same\"\ncommand = [\"true\"]\n").expect("written");
    }
    let duplicate = cluster.nave(&["apply", "-f", dir.path().to_str().expect("plain")]).expect(2);
    assert!(
        duplicate.stderr.contains("one.toml") && duplicate.stderr.contains("two.toml"),
        "{}",
        duplicate.stderr
    );

    let giant = format!("name = \"big\"\ncommand = [\"true\", \"{}\"]\n", "x".repeat(2_000_000));
    let output = cluster.apply(&giant, &[]).expect(2);
    assert!(output.stderr.contains("64 KiB") || output.stderr.contains("65536"), "{}", output.stderr);
    assert_eq!(cluster.json(&["services"]).as_array().map(Vec::len), Some(1));
}
