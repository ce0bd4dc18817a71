//! `nave token create|list|revoke`: what lets a new agent in.

use std::time::Duration;

use nave_proto::pb;
use serde::Serialize;

use crate::args::Listing;
use crate::client::{Hub, note_age};
use crate::failure::Failure;
use crate::out;
use crate::table::Table;
use crate::{clock, when};

#[derive(Debug, Serialize)]
struct TokenRow<'a> {
    id: &'a str,
    created: String,
    expires: String,
    uses_left: u32,
    actor: &'a str,
}

impl<'a> From<&'a pb::Token> for TokenRow<'a> {
    fn from(token: &'a pb::Token) -> Self {
        Self {
            id: &token.id,
            created: when::rfc3339(when::timestamp(token.created.as_ref())),
            expires: when::rfc3339(when::timestamp(token.expires.as_ref())),
            uses_left: token.uses_left,
            actor: &token.actor,
        }
    }
}

/// The token alone on stdout, so that `nave token create > FILE` is a token file.
pub(super) async fn create(ttl: Duration, uses: u32, hub: &Hub) -> Result<(), Failure> {
    let ttl = prost_types::Duration::try_from(ttl).map_err(|_| Failure::usage("--ttl is too long"))?;
    let request = pb::CreateTokenRequest { ttl: Some(ttl), uses };
    let created = hub.write(|mut member| async move { member.cluster.create_token(request).await }).await?;
    out::line(&created.token);
    out::hint(
        "keep it in a file (mode 600); on the new host: nave agent --join ADDR --token-file FILE --data-dir DIR",
    );
    Ok(())
}

pub(super) async fn list(args: &Listing, hub: &Hub) -> Result<(), Failure> {
    let listed = hub
        .read(|mut member| async move { member.cluster.list_tokens(pb::ListTokensRequest {}).await })
        .await?;
    note_age(listed.freshness.as_ref());
    if args.json() {
        out::json(&listed.tokens.iter().map(TokenRow::from).collect::<Vec<_>>());
        return Ok(());
    }
    if listed.tokens.is_empty() {
        out::aside("no tokens that could still be used");
        out::hint("`nave token create`");
        return Ok(());
    }
    let now = clock::now();
    let mut table = Table::new(["ID", "AGE", "EXPIRES IN", "USES LEFT", "MADE BY"]);
    for token in &listed.tokens {
        let left = when::timestamp(token.expires.as_ref())
            .map_or_else(|| "-".to_owned(), |end| when::span(end.duration_since(now)));
        table.row([
            token.id.as_str().into(),
            when::age(when::timestamp(token.created.as_ref()), now).into(),
            left.into(),
            token.uses_left.to_string().into(),
            token.actor.as_str().into(),
        ]);
    }
    table.print();
    Ok(())
}

pub(super) async fn revoke(id: String, hub: &Hub) -> Result<(), Failure> {
    let request = pb::RevokeTokenRequest { id: id.clone() };
    hub.write(|mut member| {
        let request = request.clone();
        async move { member.cluster.revoke_token(request).await }
    })
    .await?;
    out::line(format_args!("{id} revoked; agents that have joined with it stay"));
    Ok(())
}
