//! Tells a host that speaks another revision of the contract which one is spoken here.

use std::sync::Once;

use tonic::body::Body;
use tonic::codegen::http::{HeaderValue, Response};
use tonic::{Code, Status};

use crate::AGENT_PROTOCOL_REVISION;

static SAID: Once = Once::new();

/// `response`, with a sentence when it says that there is no such call. The first one goes to the console as well.
pub fn named(mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    let unknown = headers.get(Status::GRPC_STATUS) == Some(&HeaderValue::from(Code::Unimplemented as i32));
    if unknown && !headers.contains_key(Status::GRPC_MESSAGE) {
        let sentence = format!(
            "this call is not of protocol revision {AGENT_PROTOCOL_REVISION}, which this guest speaks: \
             a host and a bundle of one revision are needed"
        );
        SAID.call_once(|| eprintln!("vz-guest-agent: a host called what is not there: {sentence}"));
        // gRPC percent-encodes what is not plain ASCII; this is.
        if let Ok(value) = HeaderValue::from_str(&sentence) {
            headers.insert(Status::GRPC_MESSAGE, value);
        }
    }
    response
}
