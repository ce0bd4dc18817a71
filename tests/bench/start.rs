//! From `nave dev` to its ready line, and from `nave apply --wait` to its return, on a fresh folder each time.

use std::process::Command;
use std::time::Duration;

use nave_tests::machine::free_ports;
use nave_tests::nave::{self, binary};
use nave_tests::process::Process;
use nave_tests::wait::pause;
use tokio::time::Instant;

const ROUNDS: usize = 5;

pub(crate) fn run_rounds() -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let (mut ready, mut applied) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let folder = tempfile::tempdir()?;
        let data = folder.path().join("data");
        let said = folder.path().join("said");
        let mut command = Command::new(binary());
        command.args(["dev", "--port", &free_ports().to_string(), "--data-dir"]).arg(&data);
        let began = Instant::now();
        let mut dev = Process::start("dev", &mut command, &said)?;
        while !std::fs::read_to_string(&said).unwrap_or_default().contains("nave dev: ready") {
            anyhow::ensure!(began.elapsed() < Duration::from_secs(60), "dev is not ready after 60 s");
            pause(Duration::from_millis(5));
        }
        ready.push(began.elapsed());
        let manifest = "name = \"sleeper\"\ncommand = [\"sleep\", \"infinity\"]\n";
        let output =
            nave::run(Some(&data.join("client.toml")), &["apply", "-f", "-", "--wait"], Some(manifest));
        anyhow::ensure!(output.code == 0, "apply failed: {}", output.text());
        applied.push(output.took);
        dev.terminate();
    }
    ready.sort_unstable();
    applied.sort_unstable();
    Ok((ready, applied))
}

pub(crate) fn run() -> anyhow::Result<()> {
    let (ready, applied) = run_rounds()?;
    println!("| what | rounds | min ms | median ms | max ms |\n|---|---|---|---|---|");
    for (what, times) in
        [("`nave dev` to ready", ready), ("`nave apply --wait` of a process ready at once", applied)]
    {
        let ms = |n: usize| times[n].as_millis();
        println!("| {what} | {ROUNDS} | {} | {} | {} |", ms(0), ms(ROUNDS / 2), ms(ROUNDS - 1));
    }
    Ok(())
}
