//! A call that goes on by itself, and what is told of one that has ended.
use serde_json::{Map, Value, json};
use tokio::{sync::watch, task::JoinHandle};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{
    Failure,
    rpc::{Client, perform},
    scenario::Rpc,
};

pub struct Call {
    messages: watch::Receiver<Vec<Value>>,
    task: JoinHandle<Result<(), Failure>>,
}

impl Call {
    pub fn start(client: &Client, rpc: Rpc) -> Self {
        let (sender, messages) = watch::channel(Vec::new());
        let task = tokio::spawn(perform(client.clone(), rpc, sender));
        Self { messages, task }
    }

    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until it has so many messages, or no more of them will come.
    pub async fn until_messages(&mut self, count: usize) {
        let enough = self.messages.wait_for(|so_far| so_far.len() >= count);
        // An error means that the call has ended, and its end tells more.
        let _ = enough.await;
    }

    /// Drops the call where it stands, which is how a stream is cancelled here.
    pub fn cancel(&self) {
        self.task.abort();
    }

    /// Reads it to its end.
    pub async fn finish(self) -> Value {
        let ended = match self.task.await {
            Ok(ended) => ended,
            Err(error) if error.is_cancelled() => Err(Status::cancelled("dropped").into()),
            Err(error) => Err(error.into()),
        };
        let messages = self.messages.borrow().clone();
        match ended {
            Ok(()) => result(&Status::ok(""), messages),
            Err(failure) => failed(&failure, messages),
        }
    }
}

/// The result of a call that failed: its status, or why this client could not make it.
pub fn failed(failure: &Failure, messages: Vec<Value>) -> Value {
    match failure.downcast_ref::<Status>() {
        Some(status) => result(status, messages),
        None => broken(failure),
    }
}

pub fn broken(why: &Failure) -> Value {
    json!({"broken": why.to_string()})
}

/// The result of a call that has a status.
pub fn result(status: &Status, messages: Vec<Value>) -> Value {
    let mut result = json!({"code": canonical_name(status.code()), "messages": messages});
    if status.code() != Code::Ok {
        result["message"] = status.message().into();
    }
    let details = details(status);
    if !details.is_empty() {
        result["details"] = details.into();
    }
    result
}

fn details(status: &Status) -> Map<String, Value> {
    let from_trailer = status.get_error_details();
    let mut details = Map::new();
    if let Some(info) = from_trailer.error_info() {
        details.insert("reason".into(), json!(info.reason));
        details.insert("domain".into(), json!(info.domain));
        details.insert("metadata".into(), json!(info.metadata));
    }
    if let Some(request) = from_trailer.bad_request() {
        let violations = request.field_violations.iter();
        let pairs = violations.map(|v| json!({"field": v.field, "description": v.description}));
        details.insert("violations".into(), pairs.collect());
    }
    if let Some(delay) = from_trailer.retry_info().and_then(|info| info.retry_delay) {
        details.insert("retry_seconds".into(), json!(delay.as_secs_f64()));
    }
    details
}

/// tonic has `InvalidArgument` for what gRPC calls `INVALID_ARGUMENT`.
fn canonical_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}
