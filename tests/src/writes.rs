//! Writers that hammer a cluster while it is broken, and remember what was acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nave_proto::pb;

use crate::api::Api;
use crate::cluster::Cluster;

const WRITERS: usize = 8;
/// A member that is cut off answers nothing; another one is asked then.
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes distinct services until told to stop; retries a write under its request id until it is acknowledged.
/// Returns what was acknowledged, by name.
async fn write_until(api: Api, writer: usize, round: String, stop: Arc<AtomicBool>) -> Vec<String> {
    let mut acknowledged = Vec::new();
    let mut serial = 0;
    let mut member = writer;
    while !stop.load(Ordering::Relaxed) {
        serial += 1;
        let name = format!("{round}-{writer}-{serial}");
        let id = pb::RequestId { client_id: format!("{round}-{writer}"), serial };
        loop {
            let write = api.write(member, &name, Some(id.clone()));
            if tokio::time::timeout(PATIENCE, write).await.is_ok_and(|done| done.is_ok()) {
                break;
            }
            member += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        acknowledged.push(name);
    }
    acknowledged
}

/// A runtime on the operator's machine, so that its clients dial from there.
///
/// # Panics
/// When the machine has no room for a thread.
pub fn runtime_of(cluster: &Cluster) -> tokio::runtime::Runtime {
    let machine = cluster.operator();
    let enter = move || {
        if let Some(machine) = &machine {
            machine.enter();
        }
    };
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().on_thread_start(enter).build().expect("a runtime")
}

/// Runs `fault` while writers write; returns every acknowledged name.
///
/// # Panics
/// When a writer does.
pub fn under_writes(cluster: &mut Cluster, round: &str, fault: impl FnOnce(&mut Cluster)) -> Vec<String> {
    let runtime = runtime_of(cluster);
    let stop = Arc::new(AtomicBool::new(false));
    let context = cluster.context();
    let writers: Vec<_> = {
        let _inside = runtime.enter();
        let api = Api::open(&context).expect("a client");
        (0..WRITERS)
            .map(|n| runtime.spawn(write_until(api.clone(), n, round.to_owned(), stop.clone())))
            .collect()
    };
    fault(cluster);
    stop.store(true, Ordering::Relaxed);
    runtime.block_on(async {
        let mut all = Vec::new();
        for writer in writers {
            all.extend(writer.await.expect("a writer ends"));
        }
        all
    })
}
