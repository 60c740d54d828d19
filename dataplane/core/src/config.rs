//! Settings of one data plane instance, parsed once from what the agent sent.

use std::net::IpAddr;
use std::time::Duration;

use crate::wire::control as pb;

/// Fixed for the life of the instance, except `log` and `limits`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub node: String,
    pub network: String,
    pub cluster_id: String,
    pub trust_domain: String,
    pub ports: Ports,
    pub mark: u32,
    pub ipv6: bool,
    pub limits: Limits,
}

/// facts ztunnel 1.1
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    pub outbound: u16,
    pub inbound_plaintext: u16,
    pub inbound_hbone: u16,
}

impl Ports {
    /// The proxy's own ports: never a destination (facts ztunnel 1.1, `illegal_ports`).
    pub fn is_own(&self, port: u16) -> bool {
        port == self.outbound || port == self.inbound_plaintext || port == self.inbound_hbone
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub connect_timeout: Duration,
    pub tls_handshake_timeout: Duration,
    pub connect_answer_timeout: Duration,
    pub workload_wait: Duration,
    pub pool_max_streams: u32,
    pub pool_idle: Duration,
    pub pool_max_tunnels: u32,
    pub pod_max_connections: u32,
    pub drain_deadline: Duration,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {text}")]
pub struct BadConfig {
    pub field: &'static str,
    pub text: String,
}

impl Config {
    pub fn parse(raw: &pb::InstanceConfig) -> Result<Self, BadConfig> {
        if raw.node.is_empty() {
            return Err(BadConfig {
                field: "node",
                text: "the agent must name the node".into(),
            });
        }
        let ports = Ports {
            outbound: port("outbound_port", raw.outbound_port, 15001)?,
            inbound_plaintext: port("inbound_plaintext_port", raw.inbound_plaintext_port, 15006)?,
            inbound_hbone: port("inbound_hbone_port", raw.inbound_hbone_port, 15008)?,
        };
        Ok(Self {
            node: raw.node.clone(),
            network: raw.network.clone(),
            cluster_id: text_or(&raw.cluster_id, "Kubernetes"),
            trust_domain: text_or(&raw.trust_domain, "cluster.local"),
            ports,
            mark: if raw.mark == 0 { 0x539 } else { raw.mark },
            ipv6: !raw.ipv6_disabled,
            limits: Limits::parse(&raw.limits.clone().unwrap_or_default()),
        })
    }
}

impl Limits {
    pub fn parse(raw: &pb::Limits) -> Self {
        let ms = |value: u32, default: u64| {
            Duration::from_millis(if value == 0 { default } else { value.into() })
        };
        let count = |value: u32, default: u32| if value == 0 { default } else { value };
        Self {
            connect_timeout: ms(raw.connect_timeout_ms, 10_000),
            tls_handshake_timeout: ms(raw.tls_handshake_timeout_ms, 10_000),
            connect_answer_timeout: ms(raw.connect_answer_timeout_ms, 10_000),
            workload_wait: ms(raw.workload_wait_ms, 5_000),
            pool_max_streams: count(raw.pool_max_streams, 100),
            pool_idle: ms(raw.pool_idle_ms, 300_000),
            pool_max_tunnels: count(raw.pool_max_tunnels, 4096),
            pod_max_connections: count(raw.pod_max_connections, 16_384),
            drain_deadline: ms(raw.drain_deadline_ms, 5_000),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::parse(&pb::Limits::default())
    }
}

/// `::ffff:a.b.c.d` becomes `a.b.c.d`: listeners are dual-stack (facts ztunnel 1.2).
pub fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

fn port(field: &'static str, value: u32, default: u16) -> Result<u16, BadConfig> {
    match value {
        0 => Ok(default),
        _ => u16::try_from(value).map_err(|_| BadConfig {
            field,
            text: format!("{value} is not a TCP port"),
        }),
    }
}

fn text_or(value: &str, default: &str) -> String {
    if value.is_empty() { default } else { value }.to_owned()
}
