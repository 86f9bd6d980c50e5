//! Streams a completion from a running server: `./run 127.0.0.1:50051` or `./run unix:/tmp/s`.
use std::io::Write;

use proto::{
    CompletionOptions, CompletionRequest, StatusRequest, completion_request::Input,
    runner_service_client::RunnerServiceClient,
};
use tonic::{Status, transport::Endpoint};
use tonic_types::StatusExt;

mod proto {
    tonic::include_proto!("mlxrunner.v1");
}

#[tokio::main]
async fn main() {
    let address = std::env::args().nth(1).expect("usage: run ADDRESS");
    if let Err(status) = complete(address).await {
        // Handle errors by reason; messages are for humans.
        let details = status.get_error_details();
        let reason = details
            .error_info()
            .map_or("no reason", |info| &info.reason);
        eprintln!("{reason} ({:?}): {}", status.code(), status.message());
        std::process::exit(1);
    }
}

async fn complete(address: String) -> Result<(), Status> {
    let is_socket = address.starts_with("unix:");
    let scheme = if is_socket { "" } else { "http://" };
    let uri = format!("{scheme}{address}");
    let endpoint = Endpoint::from_shared(uri).map_err(|e| Status::from_error(e.into()))?;
    let mut client = RunnerServiceClient::new(endpoint.connect_lazy());

    let status = client.status(StatusRequest::default()).await?.into_inner();
    eprintln!("{:?} on {}", status.state(), status.device);

    let mut request = tonic::Request::new(CompletionRequest {
        input: Some(Input::Prompt("def fibonacci(n):".into())),
        options: Some(CompletionOptions {
            temperature: Some(0.0),
            num_predict: Some(64),
            ..Default::default()
        }),
        ..Default::default()
    });
    request.set_timeout(std::time::Duration::from_secs(300));
    let mut stream = client.completion(request).await?.into_inner();
    while let Some(piece) = stream.message().await? {
        print!("{}", piece.content);
        std::io::stdout().flush().expect("someone reads it");
        if piece.done {
            let why = piece.done_reason();
            eprintln!("\n{why:?} after {} tokens", piece.eval_count);
        }
    }
    Ok(())
}
