//! How a service is called of late, as `nave status` says it: rate, share that went well, and the time that half and all
//! but one in a hundred of its calls took.

use nave_proto::pb;
use serde::Serialize;

use crate::client::Hub;
use crate::out::{self, Tone};

/// Ended otherwise than the caller wanted, by no fault of its own.
const FAILED: [&str; 3] = ["server_error", "cut", "refused"];

/// For `-o json`.
#[derive(Debug, Serialize)]
pub(super) struct TrafficRow {
    window_seconds: f64,
    requests: std::collections::BTreeMap<String, u64>,
    requests_per_second: f64,
    /// Of the requests, 0 to 1; without requests none.
    success_share: Option<f64>,
    p50_seconds: Option<f64>,
    p99_seconds: Option<f64>,
    retries: u64,
    connections_open: u64,
    ejected: u32,
    hosts: u32,
    silent_hosts: Vec<String>,
}

/// Asks; a hub that cannot say (an older one, no port) costs the page nothing but this line.
pub(super) async fn read(hub: &Hub, service: &pb::Service) -> Option<TrafficRow> {
    let has_ports = service.manifest.as_ref().is_some_and(|manifest| !manifest.ports.is_empty());
    if !has_ports {
        return None;
    }
    let request = pb::GetServiceTrafficRequest { service: service.name.clone() };
    let got = hub.read_status(|mut member| {
        let request = request.clone();
        async move { member.services.get_service_traffic(request).await }
    });
    Some(TrafficRow::from(got.await.ok()?.ok()?))
}

impl From<pb::GetServiceTrafficResponse> for TrafficRow {
    fn from(got: pb::GetServiceTrafficResponse) -> Self {
        let traffic = got.traffic.unwrap_or_default();
        let all: u64 = traffic.requests.values().sum();
        let failed: u64 = FAILED.iter().filter_map(|class| traffic.requests.get(*class)).sum();
        let at = |share| percentile(&traffic.latency, &traffic.latency_bounds, share);
        Self {
            window_seconds: ratio(traffic.window_ms, 1000),
            requests_per_second: traffic.requests_per_second,
            success_share: (all > 0).then(|| ratio(all - failed, all)),
            p50_seconds: at(0.5),
            p99_seconds: at(0.99),
            retries: traffic.retries,
            connections_open: traffic.connections_open,
            ejected: traffic.ejected,
            hosts: got.hosts,
            silent_hosts: got.silent,
            requests: traffic.requests,
        }
    }
}

impl TrafficRow {
    pub(super) fn print(&self) {
        let silent = match self.silent_hosts.as_slice() {
            [] => String::new(),
            hosts => out::paint(Tone::Warning, &format!("; not known of {}", hosts.join(", "))),
        };
        out::line(format_args!("  calls       {}{silent}", self.text()));
    }

    fn text(&self) -> String {
        let (Some(share), Some(p50), Some(p99)) = (self.success_share, self.p50_seconds, self.p99_seconds)
        else {
            return format!("none in the last {}", when(self.window_seconds));
        };
        // Cut, not rounded: one failure in a million is not "100 %".
        let percent = (share * 10_000.0).floor() / 100.0;
        let mut text = format!(
            "{:.1}/s, {percent} % well, p50 {}, p99 {}, in the last {}",
            self.requests_per_second,
            short(p50),
            short(p99),
            when(self.window_seconds)
        );
        for (count, what) in [(self.retries, "tried again"), (u64::from(self.ejected), "left alone")] {
            if count > 0 {
                text.push_str(&format!("; {count} {what}"));
            }
        }
        text
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a minute, for a person")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

fn when(seconds: f64) -> String {
    match seconds {
        55.0.. => "minute".to_owned(),
        seconds => format!("{seconds:.0} s"),
    }
}

/// `1.2 ms`, `340 ms`, `2.5 s`.
fn short(seconds: f64) -> String {
    match seconds {
        1.0.. => format!("{seconds:.1} s"),
        0.01.. => format!("{:.0} ms", seconds * 1000.0),
        _ => format!("{:.1} ms", seconds * 1000.0),
    }
}

/// The time within which this share of them ended, as if those of a bucket were spread evenly over it. What took longer
/// than the last bound is said to have taken that.
fn percentile(counts: &[u64], bounds: &[f64], share: f64) -> Option<f64> {
    let all: u64 = counts.iter().sum();
    if all == 0 || counts.len() != bounds.len() + 1 {
        return None;
    }
    let wanted = share * ratio(all, 1);
    let mut below = 0.0;
    let mut from = 0.0;
    for (count, bound) in counts.iter().zip(bounds) {
        let count = ratio(*count, 1);
        if count > 0.0 && below + count >= wanted {
            return Some(from + (bound - from) * (wanted - below) / count);
        }
        below += count;
        from = *bound;
    }
    Some(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: [f64; 3] = [0.001, 0.01, 0.1];

    #[test]
    fn percentiles_lie_in_the_bucket_that_has_them() {
        let at = |counts: [u64; 4], share| percentile(&counts, &BOUNDS, share).unwrap();
        let close =
            |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-9, "{found} is not {wanted}");
        close(at([100, 0, 0, 0], 0.5), 0.0005);
        close(at([0, 100, 0, 0], 0.5), 0.0055);
        close(at([98, 0, 2, 0], 0.99), 0.055);
        close(at([50, 0, 0, 50], 0.99), 0.1);
        assert_eq!(percentile(&[0, 0, 0, 0], &BOUNDS, 0.5), None);
        assert_eq!(percentile(&[1, 1], &BOUNDS, 0.5), None, "of another build");
    }

    #[test]
    fn one_failure_in_many_is_seen() {
        let traffic = pb::ServiceTraffic {
            window_ms: 60_000,
            requests: [("success".to_owned(), 99_999), ("cut".to_owned(), 1)].into(),
            requests_per_second: 1666.7,
            latency: vec![100_000, 0, 0, 0],
            latency_bounds: BOUNDS.to_vec(),
            retries: 2,
            ..Default::default()
        };
        let got = pb::GetServiceTrafficResponse { traffic: Some(traffic), hosts: 3, silent: Vec::new() };
        assert_eq!(
            TrafficRow::from(got).text(),
            "1666.7/s, 99.99 % well, p50 0.5 ms, p99 1.0 ms, in the last minute; 2 tried again"
        );
        let none = pb::GetServiceTrafficResponse::default();
        assert_eq!(TrafficRow::from(none).text(), "none in the last 0 s");
    }
}
