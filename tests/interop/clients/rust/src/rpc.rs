//! The channel, and one rpc on it with the generated stubs.
use std::time::{Duration, Instant};

use prost::{Message, Name};
use serde_json::Value;
use tokio::{sync::watch, time};
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::{
    Failure, json,
    proto::runner_service_client::RunnerServiceClient,
    scenario::{Rpc, Scenario, Server},
};

pub type Client = RunnerServiceClient<InterceptedService<Channel, Bearer>>;
pub type Messages = watch::Sender<Vec<Value>>;

/// Puts the token on every call.
#[derive(Clone)]
pub struct Bearer(Option<AsciiMetadataValue>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(authorization) = &self.0 {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", authorization.clone());
        }
        Ok(request)
    }
}

/// Makes a channel of its own for a scenario; it connects with its first call.
pub fn connect(server: &Server, scenario: &Scenario) -> Result<Client, Failure> {
    let uri = match server.address.strip_prefix("unix:") {
        Some(_) => server.address.clone(),
        None => format!("http://{}", server.address),
    };
    let mut endpoint = Endpoint::from_shared(uri)?;
    if let Some(seconds) = scenario.keepalive_seconds {
        endpoint = endpoint
            .http2_keep_alive_interval(Duration::from_secs_f64(seconds))
            .keep_alive_while_idle(true);
    }
    let token = scenario.token.as_ref().or(server.token.as_ref());
    let authorization = token
        .filter(|token| !token.is_empty())
        .map(|token| format!("Bearer {token}").parse())
        .transpose()?;
    let channel = endpoint.connect_lazy();
    Ok(RunnerServiceClient::with_interceptor(
        channel,
        Bearer(authorization),
    ))
}

/// Calls, puts each message it gets into `messages`, and ends at the deadline at the latest.
pub async fn perform(client: Client, rpc: Rpc, messages: Messages) -> Result<(), Failure> {
    let began = Instant::now();
    match time::timeout(rpc.timeout(), exchange(client, &rpc, &messages)).await {
        Ok(Err(failure)) if began.elapsed() >= rpc.timeout() => Err(of_deadline(failure)),
        Ok(ended) => ended,
        Err(_) => Err(Status::deadline_exceeded("the client's timer ran out").into()),
    }
}

/// tonic's own timer, which ends at the answer's headers, and a stream that the server reset
/// at the deadline both come as `Cancelled`; nobody has cancelled anything.
fn of_deadline(failure: Failure) -> Failure {
    match failure.downcast_ref::<Status>() {
        Some(status) if status.code() == Code::Cancelled => {
            Status::deadline_exceeded(status.message()).into()
        }
        _ => failure,
    }
}

async fn exchange(mut client: Client, rpc: &Rpc, messages: &Messages) -> Result<(), Failure> {
    match rpc.name.as_str() {
        "Load" => keep(client.load(request(rpc)?).await?, messages),
        "Unload" => keep(client.unload(request(rpc)?).await?, messages),
        "Status" => keep(client.status(request(rpc)?).await?, messages),
        "Tokenize" => keep(client.tokenize(request(rpc)?).await?, messages),
        "Detokenize" => keep(client.detokenize(request(rpc)?).await?, messages),
        "Embed" => keep(client.embed(request(rpc)?).await?, messages),
        "RenderChat" => keep(client.render_chat(request(rpc)?).await?, messages),
        "Completion" => keep_all(client.completion(request(rpc)?).await?, messages).await,
        "Chat" => keep_all(client.chat(request(rpc)?).await?, messages).await,
        other => Err(format!("no rpc {other}").into()),
    }
}

fn request<T: Message + Name + Default>(rpc: &Rpc) -> Result<Request<T>, Failure> {
    let mut request = Request::new(json::read(&rpc.request)?);
    request.set_timeout(rpc.timeout());
    Ok(request)
}

fn keep<T: Message + Name>(answer: Response<T>, messages: &Messages) -> Result<(), Failure> {
    push(answer.get_ref(), messages)
}

async fn keep_all<T: Message + Name>(
    answer: Response<Streaming<T>>,
    messages: &Messages,
) -> Result<(), Failure> {
    let mut stream = answer.into_inner();
    while let Some(message) = stream.message().await? {
        push(&message, messages)?;
    }
    Ok(())
}

fn push<T: Message + Name>(message: &T, messages: &Messages) -> Result<(), Failure> {
    let json = json::write(message)?;
    messages.send_modify(|so_far| so_far.push(json));
    Ok(())
}
