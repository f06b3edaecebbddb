//! `AgentService`: the guest itself and the commands in it.

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::exec::Commands;
use crate::feed::Events;
use crate::idempotency::to_the_end;
use crate::proto::agent_service_server::AgentService;
use crate::proto::{
    ExecRequest, PingRequest, PingResponse, PortForwardFrame, ResizeExecPtyRequest, ResizeExecPtyResponse,
    ResourceStatsRequest, ResourceStatsResponse, SignalRequest, SignalResponse, StdinCloseRequest, StdinCloseResponse,
    StdinWriteRequest, StdinWriteResponse, SystemInfoRequest, SystemInfoResponse,
};
use crate::system::Processors;
use crate::{forward, system};

/// The service.
#[derive(Default)]
pub struct Agent {
    commands: Commands,
    processors: Processors,
}

#[tonic::async_trait]
impl AgentService for Agent {
    type ExecStream = Events;
    type PortForwardStream = ReceiverStream<Result<PortForwardFrame, Status>>;

    async fn ping(&self, _: Request<PingRequest>) -> Result<Response<PingResponse>, Status> {
        Ok(Response::new(PingResponse {}))
    }

    async fn system_info(&self, _: Request<SystemInfoRequest>) -> Result<Response<SystemInfoResponse>, Status> {
        system::info().map(Response::new).map_err(|error| unreadable(&error))
    }

    async fn resource_stats(
        &self,
        _: Request<ResourceStatsRequest>,
    ) -> Result<Response<ResourceStatsResponse>, Status> {
        let stats = system::stats(&self.processors);
        stats.map(Response::new).map_err(|error| unreadable(&error))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<Self::ExecStream>, Status> {
        self.commands.run(request).map(Response::new)
    }

    async fn stdin_write(&self, request: Request<StdinWriteRequest>) -> Result<Response<StdinWriteResponse>, Status> {
        let commands = self.commands.clone();
        let call = |request| async move { commands.write(request).await.map(|()| StdinWriteResponse {}) };
        to_the_end("StdinWrite", request, call).await
    }

    async fn stdin_close(&self, request: Request<StdinCloseRequest>) -> Result<Response<StdinCloseResponse>, Status> {
        let commands = self.commands.clone();
        let call = |request| async move { commands.close(request).await.map(|()| StdinCloseResponse {}) };
        to_the_end("StdinClose", request, call).await
    }

    async fn signal(&self, request: Request<SignalRequest>) -> Result<Response<SignalResponse>, Status> {
        let commands = self.commands.clone();
        let call = |request| async move { commands.signal(&request).map(|()| SignalResponse {}) };
        to_the_end("Signal", request, call).await
    }

    async fn resize_exec_pty(
        &self,
        request: Request<ResizeExecPtyRequest>,
    ) -> Result<Response<ResizeExecPtyResponse>, Status> {
        let commands = self.commands.clone();
        let call = |request| async move { commands.resize(&request).map(|()| ResizeExecPtyResponse {}) };
        to_the_end("ResizeExecPty", request, call).await
    }

    async fn port_forward(
        &self,
        request: Request<Streaming<PortForwardFrame>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let frames = forward::open(request.into_inner()).await?;
        Ok(Response::new(ReceiverStream::new(frames)))
    }
}

fn unreadable(error: &std::io::Error) -> Status {
    Status::internal(format!("the guest cannot be read: {error}"))
}
