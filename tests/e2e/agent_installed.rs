//! Promise: `nave agent install` writes units that systemd accepts and under which services outlive the agent.

use std::process::Command;

use nave_tests::nave;

#[test]
fn the_units_are_such_that_systemd_accepts_them() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = dir.path().join("agent 1.toml");
    std::fs::write(&config, "data_dir = \"data\"\njoin = [\"127.0.0.1:7400\"]\n").expect("it can be written");
    let unit = dir.path().join("nave-agent.service");
    let services = dir.path().join("nave-services.service");
    let words = |more: &[&'static str]| {
        let paths = [config.to_str(), unit.to_str()].map(|path| path.expect("plain names").to_owned());
        let [config, unit] = paths;
        let mut words = vec!["agent".to_owned(), "install".into(), "--config".into(), config];
        words.extend(["--unit".to_owned(), unit]);
        words.extend(more.iter().map(|word| (*word).to_owned()));
        words
    };
    let run = |more: &[&'static str]| {
        let words = words(more);
        nave::run(None, &words.iter().map(String::as_str).collect::<Vec<_>>(), None)
    };
    let printed = run(&["--print"]).expect(0);
    assert!(!unit.exists() && !services.exists(), "printing writes nothing");
    run(&[]).expect(0);
    run(&[]).expect(0);
    let [text, of_services] =
        [&unit, &services].map(|unit| std::fs::read_to_string(unit).expect("it is there"));
    let both = format!("# {}\n{text}# {}\n{of_services}", unit.display(), services.display());
    assert_eq!(both, printed.stdout);
    for line in ["Delegate=yes", "KillMode=process", "Restart=always", "PartOf=nave-services.service"] {
        assert!(text.lines().any(|other| other == line), "{text}");
    }
    for line in ["Delegate=yes", "ExitType=cgroup", "OOMPolicy=continue"] {
        assert!(of_services.lines().any(|other| other == line), "{of_services}");
    }
    assert!(text.contains("agent --config \"/"), "an absolute path, quoted: {text}");
    match Command::new("systemd-analyze").args(["verify", "--man=no"]).args([&unit, &services]).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success() && said.is_empty(), "{said}");
        }
        Err(_) => skipped(),
    }

    for theirs in [&unit, &services] {
        std::fs::write(theirs, "[Unit]\n").expect("it can be written");
        let refused = run(&[]).expect(1);
        assert!(refused.text().contains("not one of ours"), "{}", refused.text());
        std::fs::remove_file(theirs).expect("it can be removed");
    }
}

#[expect(clippy::print_stderr, reason = "says that a part was not tested")]
fn skipped() {
    eprintln!("systemd-analyze is not there: the units were not verified");
}
