//! `NetworkService`: the network of a stack's services. This version serves none of it, and says so.

use tonic::{Request, Response, Status};

use crate::not_served;
use crate::proto::network_service_server::NetworkService;
use crate::proto::{NetworkSetupRequest, NetworkSetupResponse, NetworkTeardownRequest, NetworkTeardownResponse};

/// The service.
pub struct Network;

#[tonic::async_trait]
impl NetworkService for Network {
    async fn setup(&self, _: Request<NetworkSetupRequest>) -> Result<Response<NetworkSetupResponse>, Status> {
        Err(not_served("NetworkService.Setup"))
    }

    async fn teardown(&self, _: Request<NetworkTeardownRequest>) -> Result<Response<NetworkTeardownResponse>, Status> {
        Err(not_served("NetworkService.Teardown"))
    }
}
