//! `nave events`: who, what, why; with `-f` it goes on, across members, without a gap.

use std::time::Duration;

use jiff::Timestamp;
use nave_proto::pb;
use serde::Serialize;

use crate::args::Events;
use crate::client::{Hub, note_age};
use crate::failure::Failure;
use crate::out::{self, Tone};
use crate::{clock, when};

#[derive(Debug, Serialize)]
pub(super) struct EventRow<'a> {
    revision: u64,
    index: u32,
    time: String,
    kind: &'a str,
    service: &'a str,
    instance: &'a str,
    host: &'a str,
    actor: &'a str,
    message: &'a str,
}

impl<'a> From<&'a pb::Event> for EventRow<'a> {
    fn from(event: &'a pb::Event) -> Self {
        Self {
            revision: event.revision,
            index: event.index,
            time: when::rfc3339(when::timestamp(event.time.as_ref())),
            kind: &event.kind,
            service: &event.service,
            instance: &event.instance_id,
            host: &event.host,
            actor: &event.actor,
            message: &event.message,
        }
    }
}

/// One event on one line: when, what happened, which person did it.
pub(super) fn text(event: &pb::Event, now: Timestamp, absolute: bool) -> String {
    let time = when::timestamp(event.time.as_ref());
    let time = if absolute { when::rfc3339(time) } else { format!("{:>4}", when::age(time, now)) };
    let message = if event.message.is_empty() { event.kind.replace('_', " ") } else { event.message.clone() };
    // Only what the sentence does not say by itself.
    let about = [&event.service, &event.instance_id, &event.host];
    let about: Vec<&str> =
        about.into_iter().map(String::as_str).filter(|part| !message.contains(part)).collect();
    let about = if about.is_empty() { String::new() } else { format!("{}: ", about.join(" ")) };
    // What agents report of their own hosts needs no author; what people do does.
    let actor = match event.actor.split_once('/') {
        Some(("operator", name)) => out::paint(Tone::Dim, &format!("  (by {name})")),
        _ => String::new(),
    };
    format!(
        "{}  {}{actor}",
        out::paint(Tone::Dim, &time),
        out::paint(tone(event), &format!("{about}{message}"))
    )
}

fn tone(event: &pb::Event) -> Tone {
    let kind = event.kind.as_str();
    let has = |words: &[&str]| words.iter().any(|word| kind.contains(word));
    match kind {
        _ if has(&["failed", "lost", "reverted"]) => Tone::Bad,
        _ if has(&["exited", "backing_off"]) && !event.message.contains("was stopped") => Tone::Warning,
        _ => Tone::Plain,
    }
}

pub(super) async fn run(args: &Events, hub: &Hub) -> Result<(), Failure> {
    let request = pb::ListEventsRequest {
        service: args.service.clone().unwrap_or_default(),
        host: args.host.clone().unwrap_or_default(),
        limit: args.tail.max(1),
        linearizable: false,
    };
    let mut listed = hub
        .read(|mut member| {
            let request = request.clone();
            async move { member.events.list_events(request).await }
        })
        .await?;
    if args.tail == 0 {
        listed.events.clear();
    }
    note_age(listed.freshness.as_ref());
    if args.listing.json() && !args.follow {
        out::json(&listed.events.iter().map(EventRow::from).collect::<Vec<_>>());
        return Ok(());
    }
    if listed.events.is_empty() && !args.follow {
        out::aside("no events");
        return Ok(());
    }
    print(args, &listed.events);
    if args.follow { follow(args, hub, listed.cursor).await } else { Ok(()) }
}

fn print(args: &Events, events: &[pb::Event]) {
    let now = clock::now();
    for event in events {
        if args.listing.json() {
            out::json_line(&EventRow::from(event));
        } else {
            out::line(text(event, now, true));
        }
    }
    out::flush();
}

/// Between tries when no member can be watched.
const PAUSE: Duration = Duration::from_millis(500);

async fn follow(args: &Events, hub: &Hub, mut cursor: Option<pb::WatchCursor>) -> Result<(), Failure> {
    let mut quiet = false;
    loop {
        let request = pb::WatchRequest {
            resume: cursor.clone(),
            service: args.service.clone().unwrap_or_default(),
            events_only: true,
            host: args.host.clone().unwrap_or_default(),
        };
        let trouble = match hub.member().services.watch(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(update)) => {
                            quiet = false;
                            print(args, &events_of(&update));
                            cursor = update.cursor.or(cursor);
                        }
                        Ok(None) => break "the member ended the stream".to_owned(),
                        Err(status) => break status.message().to_owned(),
                    }
                }
            }
            Err(status) if crate::client::passes_over(&status) => crate::client::reason(&status),
            Err(status) => return Err(Failure::from_status(&status)),
        };
        if !quiet {
            out::note(format_args!("{trouble}; asking another member, nothing is skipped"));
            quiet = true;
        }
        hub.pass_over();
        tokio::time::sleep(PAUSE).await;
    }
}

fn events_of(update: &pb::WatchResponse) -> Vec<pb::Event> {
    let event = |item: &pb::WatchItem| match &item.item {
        Some(pb::watch_item::Item::Event(event)) => Some(event.clone()),
        _ => None,
    };
    update.items.iter().filter_map(event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_says_when_what_why_and_who() {
        let event = pb::Event {
            kind: "instance_exited".into(),
            service: "web".into(),
            instance_id: "i-3".into(),
            actor: "agent/h-1".into(),
            message: "exited with 1".into(),
            time: Some(prost_types::Timestamp { seconds: 100, nanos: 0 }),
            ..Default::default()
        };
        let now = Timestamp::from_second(160).unwrap();
        assert_eq!(text(&event, now, false), "  1m  web i-3: exited with 1");
        let applied = pb::Event {
            message: "web is new".into(),
            actor: "operator/ann".into(),
            service: "web".into(),
            ..event
        };
        assert_eq!(text(&applied, now, true), "1970-01-01T00:01:40.000Z  i-3: web is new  (by ann)");
    }
}
