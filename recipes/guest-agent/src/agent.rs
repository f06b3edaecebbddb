//! `AgentService`: the guest itself and the commands in it.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::proto::agent_service_server::AgentService;
use crate::proto::{
    ExecEvent, ExecRequest, PingRequest, PingResponse, PortForwardFrame, ResizeExecPtyRequest, ResizeExecPtyResponse,
    ResourceStatsRequest, ResourceStatsResponse, SignalRequest, SignalResponse, StdinCloseRequest, StdinCloseResponse,
    StdinWriteRequest, StdinWriteResponse, SystemInfoRequest, SystemInfoResponse,
};
use crate::{exec, forward, not_served, system};

/// The service; counts the commands it has run.
#[derive(Default)]
pub struct Agent {
    execs: AtomicU64,
}

#[tonic::async_trait]
impl AgentService for Agent {
    type ExecStream = ReceiverStream<Result<ExecEvent, Status>>;
    type PortForwardStream = ReceiverStream<Result<PortForwardFrame, Status>>;

    async fn ping(&self, _: Request<PingRequest>) -> Result<Response<PingResponse>, Status> {
        Ok(Response::new(PingResponse {}))
    }

    async fn system_info(&self, _: Request<SystemInfoRequest>) -> Result<Response<SystemInfoResponse>, Status> {
        let info = system::info().map_err(|error| Status::internal(format!("the guest cannot be read: {error}")))?;
        Ok(Response::new(info))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<Self::ExecStream>, Status> {
        let exec_id = self.execs.fetch_add(1, Ordering::Relaxed) + 1;
        let events = exec::run(exec_id, request.into_inner())?;
        Ok(Response::new(ReceiverStream::new(events)))
    }

    async fn resource_stats(
        &self,
        _: Request<ResourceStatsRequest>,
    ) -> Result<Response<ResourceStatsResponse>, Status> {
        Err(not_served("ResourceStats"))
    }

    async fn stdin_write(&self, _: Request<StdinWriteRequest>) -> Result<Response<StdinWriteResponse>, Status> {
        Err(not_served("StdinWrite"))
    }

    async fn stdin_close(&self, _: Request<StdinCloseRequest>) -> Result<Response<StdinCloseResponse>, Status> {
        Err(not_served("StdinClose"))
    }

    async fn signal(&self, _: Request<SignalRequest>) -> Result<Response<SignalResponse>, Status> {
        Err(not_served("Signal"))
    }

    async fn resize_exec_pty(
        &self,
        _: Request<ResizeExecPtyRequest>,
    ) -> Result<Response<ResizeExecPtyResponse>, Status> {
        Err(not_served("ResizeExecPty"))
    }

    async fn port_forward(
        &self,
        request: Request<Streaming<PortForwardFrame>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let frames = forward::open(request.into_inner()).await?;
        Ok(Response::new(ReceiverStream::new(frames)))
    }
}
