//! Runs the scenarios of one file against the servers of another: see ../../../README.md.
use std::{
    collections::HashMap,
    env, fs,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use tokio::time;
use tonic::{Request, Status};

use crate::{
    call::{Call, broken, failed, result},
    proto::{StatusRequest, StatusResponse},
    rpc::Client,
    scenario::{Scenario, Servers, Step},
};

mod call;
mod json;
mod rpc;
mod scenario;

mod proto {
    tonic::include_proto!("mlxrunner.v1");
}

/// A gRPC status, or else a defect of this client.
type Failure = Box<dyn std::error::Error + Send + Sync>;

const POLL: Duration = Duration::from_millis(20);
const STATUS_PATIENCE: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().collect();
    let [_, scenarios, servers] = arguments.as_slice() else {
        return Err("usage: client SCENARIOS SERVERS".into());
    };
    let scenarios: Vec<Scenario> = serde_json::from_str(&fs::read_to_string(scenarios)?)?;
    let servers: Servers = serde_json::from_str(&fs::read_to_string(servers)?)?;
    for scenario in &scenarios {
        let results = results(scenario, &servers).await;
        println!("{}", json!({"scenario": scenario.name, "results": results}));
    }
    Ok(())
}

async fn results(scenario: &Scenario, servers: &Servers) -> Vec<Value> {
    let server = servers.get(&scenario.server).ok_or("no such server");
    let connected = server.map_err(Failure::from);
    let client = match connected.and_then(|server| rpc::connect(server, scenario)) {
        Ok(client) => client,
        Err(why) => {
            return scenario.steps.iter().map(|_| broken(&why)).collect();
        }
    };
    let mut runner = Runner::new(client);
    let mut results = Vec::new();
    for step in &scenario.steps {
        let done = runner.step(step).await;
        results.push(done.unwrap_or_else(|failure| failed(&failure, Vec::new())));
    }
    runner.abandon();
    results
}

/// The steps of one scenario, on one channel.
struct Runner {
    client: Client,
    calls: HashMap<String, Call>,
}

impl Runner {
    fn new(client: Client) -> Self {
        let calls = HashMap::new();
        Self { client, calls }
    }

    async fn step(&mut self, step: &Value) -> Result<Value, Failure> {
        match serde_json::from_value(step.clone())? {
            Step::Call { rpc, watch_status } => {
                let call = Call::start(&self.client, rpc);
                if !watch_status {
                    return Ok(call.finish().await);
                }
                let watched = self.watch(&call).await;
                let statuses = watched.map_err(|why| format!("no Status meanwhile: {why}"))?;
                let mut answer = call.finish().await;
                answer["statuses"] = statuses.into();
                Ok(answer)
            }
            Step::Start {
                name,
                rpc,
                until_messages,
            } => {
                let mut call = Call::start(&self.client, rpc);
                call.until_messages(until_messages).await;
                self.calls.insert(name, call);
                Ok(json!({}))
            }
            Step::Cancel { of } => {
                let call = self.take(&of)?;
                call.cancel();
                Ok(call.finish().await)
            }
            Step::Finish { of } => Ok(self.take(&of)?.finish().await),
            Step::UntilStatus { fields } => self.until_status(&fields).await,
        }
    }

    /// Asks for `Status` until the call has ended, and once more after that.
    async fn watch(&self, call: &Call) -> Result<Vec<Value>, Failure> {
        let mut statuses = Vec::new();
        loop {
            let ended = call.has_ended();
            statuses.push(json::write(&self.status().await?)?);
            if ended {
                return Ok(statuses);
            }
            time::sleep(POLL).await;
        }
    }

    async fn until_status(&self, fields: &Map<String, Value>) -> Result<Value, Failure> {
        let began = Instant::now();
        loop {
            let status = self.status().await?;
            if json::has_fields(&status, fields)? || began.elapsed() > STATUS_PATIENCE {
                return Ok(result(&Status::ok(""), vec![json::write(&status)?]));
            }
            time::sleep(POLL).await;
        }
    }

    async fn status(&self) -> Result<StatusResponse, Failure> {
        let mut request = Request::new(StatusRequest::default());
        request.set_timeout(STATUS_PATIENCE);
        Ok(self.client.clone().status(request).await?.into_inner())
    }

    fn take(&mut self, name: &str) -> Result<Call, Failure> {
        let call = self.calls.remove(name);
        call.ok_or_else(|| format!("no call {name} was started").into())
    }

    /// Ends what no step has ended.
    fn abandon(self) {
        self.calls.values().for_each(Call::cancel);
    }
}
