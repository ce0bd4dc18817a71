//! Promise: a job runs once, its result is kept, and no host that goes has it run again.

use nave_tests::cluster::SOON;
use nave_tests::{Cluster, Setup, eventually};

fn job(name: &str, script: &str, more: &str) -> String {
    format!("name = \"{name}\"\nkind = \"job\"\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]\n{more}\n")
}

#[test]
fn a_job_runs_once_and_its_result_outlives_its_host() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 2 });
    let done = cluster.apply(&job("tidy", "echo tidied", ""), &["--wait"]).expect(0);
    assert!(done.text().contains("run 1 succeeded"), "{}", done.text());
    let ran = |times| {
        eventually("its output outlives it", SOON, || {
            cluster.nave(&["logs", "tidy"]).stdout.matches("tidied").count() == times
        });
    };
    ran(1);
    let status = cluster.nave(&["status", "tidy"]).expect(0).stdout;
    assert!(status.contains("succeeded") && status.contains("runs"), "{status}");
    eventually("its process is gone", SOON, || cluster.ps("tidy").is_empty());

    for host in ["agent-1", "agent-2"] {
        cluster.nave(&["drain", host, "--wait"]).expect(0);
        cluster.nave(&["undrain", host]).expect(0);
    }
    cluster.nave(&["restart", "tidy", "--wait"]).expect(0);
    // Had a drain run it again, there would be more.
    ran(2);

    let failed =
        cluster.apply(&job("bad", "exit 3", "[restart]\nbudget = \"1 in 1h\""), &["--wait"]).expect(1);
    assert!(failed.stderr.contains("run 1 failed"), "{}", failed.stderr);
    cluster.apply(&job("nightly", "exit 0", "schedule = \"0 3 * * * Europe/Berlin\""), &["--wait"]).expect(0);
    eventually("it is known when it runs", SOON, || {
        cluster.nave(&["status", "nightly"]).expect(0).stdout.contains("next run")
    });
    let events = cluster.nave(&["events", "--service", "bad"]).expect(0).stdout;
    assert!(events.contains("run 1 of bad failed"), "{events}");
}
