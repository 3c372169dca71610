//! The wire types of hostd, protocol 1 (docs/contract.md, section 2); protocol 2 adds `workspace_id` and `volumes`.
//!
//! Envelopes are always maps (`rmp_serde::to_vec_named`). The serde types inside them may be maps or
//! arrays; hostd answers in the form of the request. Ignore what you do not know, as serde does.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantNet {
    pub tenant_net_id: u16,
    pub ipv4_subnet: String,
    pub gateway_ip: String,
    pub bridge_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostdRequest {
    StartInstance { tenant_id: String, pool_id: String, instance_id: String },
    StopInstance { tenant_id: String, pool_id: String, instance_id: String },
    SleepInstance {
        tenant_id: String,
        pool_id: String,
        instance_id: String,
        force: bool,
        #[serde(default)]
        drain_timeout_secs: Option<u64>,
    },
    WakeInstance { tenant_id: String, pool_id: String, instance_id: String },
    DestroyInstance { tenant_id: String, pool_id: String, instance_id: String, wipe_volumes: bool },
    SetupNetwork { tenant_id: String, net: TenantNet },
    TeardownNetwork { tenant_id: String, net: TenantNet },
    Ping,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostdResponse {
    Ok,
    Error { message: String },
    Pong,
}

/// A command; times are absolute Unix milliseconds. `id` is the idempotency key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    pub v: u8,
    pub id: String,
    pub request: HostdRequest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issued_at_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    pub took_us: u64,
    pub outcome: String,
}

/// A reply. `code` is a string: a newer hostd may have more of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    pub v: u8,
    pub id: String,
    pub host_id: String,
    pub response: HostdResponse,
    pub code: String,
    pub retryable: bool,
    pub changed: bool,
    pub status: Option<String>,
    pub attempts: u32,
    pub replayed: bool,
    pub received_at_ms: u64,
    pub finished_at_ms: u64,
    pub steps: Vec<Step>,
    pub left_behind: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supported: Vec<String>,
    pub detail: BTreeMap<String, Value>,
    /// Which request it answers: the first 32 hex digits of the SHA-256 of `rmp_serde::to_vec_named(&request)` with these types.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_digest: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
}

impl Reply {
    /// Who must act: `sender`, `scheduler` or `operator`; None for `ok`.
    pub fn act(&self) -> Option<&str> {
        self.detail.get("act").and_then(Value::as_str)
    }
}

/// An event; `seq` has no gaps within a `journal_id`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub v: u8,
    pub id: String,
    pub host_id: String,
    pub boot_id: String,
    pub journal_id: String,
    pub seq: u64,
    pub at_ms: u64,
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub detail: BTreeMap<String, Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
}
