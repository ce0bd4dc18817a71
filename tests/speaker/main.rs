//! A service for tests that speaks what a few lines of a script cannot, on `$HOST:$PORT`: `nave-test-speaker grpc` the
//! standard health and reflection services, `nave-test-speaker websocket` an echo of text and bytes.

use std::net::SocketAddr;

use anyhow::{Context as _, bail};
use futures::{SinkExt as _, StreamExt as _};
use tokio::net::{TcpListener, TcpStream};

fn main() -> anyhow::Result<()> {
    let variable = |name| std::env::var(name).with_context(|| format!("{name} is not set"));
    let address = format!("{}:{}", variable("HOST")?, variable("PORT")?).parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match std::env::args().nth(1).as_deref() {
        Some("grpc") => runtime.block_on(grpc(address)),
        Some("websocket") => runtime.block_on(websocket(address)),
        other => bail!("grpc or websocket, not {other:?}"),
    }
}

async fn grpc(address: SocketAddr) -> anyhow::Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("spoken", tonic_health::ServingStatus::Serving).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    tonic::transport::Server::builder().add_service(health).add_service(reflection).serve(address).await?;
    Ok(())
}

async fn websocket(address: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let mut callers = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                callers.spawn(echo(accepted?.0));
            }
            Some(_) = callers.join_next() => {}
        }
    }
}

async fn echo(stream: TcpStream) -> anyhow::Result<()> {
    let mut socket = tokio_tungstenite::accept_async(stream).await?;
    while let Some(message) = socket.next().await {
        let message = message?;
        if message.is_text() || message.is_binary() {
            socket.send(message).await?;
        }
    }
    Ok(())
}
