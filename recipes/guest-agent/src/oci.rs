//! `OciService`: containers in the guest. This version serves none of it, and says so.

use tonic::{Request, Response, Status};

use crate::not_served;
use crate::proto::oci_service_server::OciService;
use crate::proto::{
    OciCreateRequest, OciCreateResponse, OciDeleteRequest, OciDeleteResponse, OciExecRequest, OciExecResponse,
    OciKillRequest, OciKillResponse, OciStartRequest, OciStartResponse, OciStateRequest, OciStateResponse,
};

/// The service.
pub struct Oci;

#[tonic::async_trait]
impl OciService for Oci {
    async fn create(&self, _: Request<OciCreateRequest>) -> Result<Response<OciCreateResponse>, Status> {
        Err(not_served("OciService.Create"))
    }

    async fn start(&self, _: Request<OciStartRequest>) -> Result<Response<OciStartResponse>, Status> {
        Err(not_served("OciService.Start"))
    }

    async fn state(&self, _: Request<OciStateRequest>) -> Result<Response<OciStateResponse>, Status> {
        Err(not_served("OciService.State"))
    }

    async fn exec(&self, _: Request<OciExecRequest>) -> Result<Response<OciExecResponse>, Status> {
        Err(not_served("OciService.Exec"))
    }

    async fn kill(&self, _: Request<OciKillRequest>) -> Result<Response<OciKillResponse>, Status> {
        Err(not_served("OciService.Kill"))
    }

    async fn delete(&self, _: Request<OciDeleteRequest>) -> Result<Response<OciDeleteResponse>, Status> {
        Err(not_served("OciService.Delete"))
    }
}
