//! What the two files hold that a client is given.
use std::{collections::HashMap, time::Duration};

use serde::Deserialize;
use serde_json::{Map, Value};

pub type Servers = HashMap<String, Server>;

#[derive(Deserialize)]
pub struct Server {
    pub address: String,
    pub token: Option<String>,
}

#[derive(Deserialize)]
pub struct Scenario {
    pub name: String,
    pub server: String,
    pub keepalive_seconds: Option<f64>,
    /// Instead of the server's own; the empty string means none.
    pub token: Option<String>,
    /// Read one by one, so that one which is not understood leaves the others.
    pub steps: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Step {
    Call {
        #[serde(flatten)]
        rpc: Rpc,
        #[serde(default)]
        watch_status: bool,
    },
    Start {
        #[serde(rename = "as")]
        name: String,
        #[serde(flatten)]
        rpc: Rpc,
        #[serde(default)]
        until_messages: usize,
    },
    Cancel {
        of: String,
    },
    Finish {
        of: String,
    },
    UntilStatus {
        fields: Map<String, Value>,
    },
}

#[derive(Deserialize)]
pub struct Rpc {
    #[serde(rename = "rpc")]
    pub name: String,
    #[serde(default = "empty")]
    pub request: Value,
    #[serde(default = "two_minutes")]
    timeout_seconds: f64,
}

impl Rpc {
    pub fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout_seconds)
    }
}

fn empty() -> Value {
    Value::Object(Map::new())
}

fn two_minutes() -> f64 {
    120.0
}
