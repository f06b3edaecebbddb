//! The guest agent of a vz sandbox: serves the contract `vz.agent.v1` on a vsock port.
//!
//! One module per concern: [`transport`] accepts connections ([`authority`] takes any name for one), [`agent`], [`oci`]
//! and [`network`] are the services, [`exec`] runs commands ([`command`] starts one, [`channel`] is an end of its pipe
//! or terminal, [`feed`] its events, [`aside`] what it may wait for), [`user`] says who runs them, [`forward`] connects
//! to ports, [`idempotency`] answers repeated calls, [`system`] describes the guest, [`clock`] sets its clock,
//! [`resume`] keeps it its own across restores, [`limits`] is about open files, [`oom`] about memory that runs out,
//! [`youki`] runs containers, with [`shim`] beside them, [`collect`] waits for a program and what it prints,
//! [`netlink`] asks the kernel for interfaces, [`subnet`] reads their addresses, [`revision`] answers hosts of another
//! one.

use std::path::PathBuf;

pub mod agent;
pub mod aside;
pub mod authority;
pub mod channel;
pub mod clock;
pub mod collect;
pub mod command;
pub mod exec;
pub mod feed;
pub mod forward;
pub mod idempotency;
pub mod limits;
pub mod netlink;
pub mod network;
pub mod oci;
pub mod oom;
pub mod resume;
mod revision;
pub mod shim;
pub mod subnet;
pub mod system;
pub mod transport;
pub mod user;
pub mod youki;

/// The messages, service traits and clients generated from `proto/vz/agent/v1/agent.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("vz.agent.v1");
}

/// The agent's version, as `version.json` names it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The revision of `vz.agent.v1` spoken here.
pub const AGENT_PROTOCOL_REVISION: u32 = 1;

/// Bytes of one call that a client may send before the agent has taken them in. HTTP/2 counts them against the
/// connection's window as well: with the two alike, one call whose target does not read would stop all others.
const STREAM_WINDOW: u32 = 64 * 1024;

/// Bytes of all calls of a connection that may wait: what stalled calls cost in memory at most.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// Calls that one connection may have under way, and cancel at once. hyper's own limits are 200 and 20; a running
/// command is a call.
const MAX_STREAMS: u32 = 10_000;

/// Serves all of the contract on `connections` until they end, which they never do on a listening socket;
/// containers by the program `oci_runtime`, or the one of the host's share.
///
/// # Errors
/// Only what tonic's server raises as a whole; a broken connection ends alone.
pub async fn serve(
    connections: transport::Connections,
    oci_runtime: Option<PathBuf>,
) -> Result<(), tonic::transport::Error> {
    use proto::{
        agent_service_server::AgentServiceServer, network_service_server::NetworkServiceServer,
        oci_service_server::OciServiceServer,
    };
    tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_pending_accept_reset_streams(Some(MAX_STREAMS as usize))
        .layer(tower::util::MapResponseLayer::new(revision::named))
        .add_service(AgentServiceServer::new(agent::Agent::default()))
        .add_service(OciServiceServer::new(oci::Oci::new(oci_runtime)))
        .add_service(NetworkServiceServer::new(network::Network::default()))
        .serve_with_incoming(connections)
        .await
}
