//! The agent's proxy beside others that people put there: the same backend (nginx, one worker, a service of Nave), the
//! same load (wrk, h2load, and a reader of bytes), one after the other on one machine, each with two worker threads. Said
//! for each: requests per second, the half and the last hundredth of the answers, its own CPU seconds for a million
//! requests, and its resident memory under that load. What is not installed is said and left out; `ENVOY` and `CADDY`
//! name binaries. `nave-bench proxy http1 Nave HAProxy` measures only these.

mod load;
mod rivals;
mod subject;

use load::Load;
pub(crate) use load::source;
use subject::{Backend, Subject};

/// Started by the measurement itself, as a service whose bytes are read.
pub(crate) const SOURCE: &str = "__source";

pub(crate) fn run() -> anyhow::Result<()> {
    if let Some(missing) = ["nginx", "wrk", "h2load"].into_iter().find(|name| subject::find(name).is_none()) {
        println!("skipped: no {missing} (apt-get install nginx-light wrk nghttp2-client)");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    // Read by whoever the services run as.
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let backend = Backend::start(folder.path())?;
    let words: Vec<String> = std::env::args().skip(2).collect();
    let loads = [Load::Http1, Load::Http2, Load::Tcp];
    let (only, subjects): (Vec<String>, Vec<String>) =
        words.into_iter().partition(|word| loads.iter().any(|load| load.word() == word));
    let is_wanted = |name: &str| subjects.is_empty() || subjects.iter().any(|one| one == name);
    for load in
        loads.into_iter().filter(|load| only.is_empty() || only.iter().any(|word| word == load.word()))
    {
        println!("\n### {}\n", load.title());
        println!(
            "| through | {} | p50 ms | p99 ms | its CPU seconds {} | its resident MiB |",
            load.rate(),
            load.per()
        );
        println!("|---|---|---|---|---|---|");
        if is_wanted("nobody") {
            row("nobody", load, &Subject::direct(&backend, load)?)?;
        }
        if is_wanted("Nave") {
            row("Nave", load, &backend.through_nave(load))?;
        }
        for rival in rivals::RIVALS.into_iter().filter(|rival| is_wanted(rival.name)) {
            match rival.start(folder.path(), &backend, load)? {
                Some(subject) => row(rival.name, load, &subject)?,
                None => println!("| {} | does not, or is not installed | | | | |", rival.name),
            }
        }
    }
    Ok(())
}

fn row(name: &str, load: Load, subject: &Subject) -> anyhow::Result<()> {
    // The first run fills pools and caches.
    load.run(subject.port, subject.host(), std::time::Duration::from_secs(1))?;
    let before = subject.cpu_seconds();
    let measured = load.run(subject.port, subject.host(), load::LASTS)?;
    let cpu = subject.cpu_seconds() - before;
    println!(
        "| {name} | {:.0} | {:.2} | {:.2} | {:.1} | {:.0} |",
        measured.per_second,
        measured.half_ms,
        measured.last_ms,
        cpu / measured.units,
        subject.resident_mebibytes()
    );
    Ok(())
}
