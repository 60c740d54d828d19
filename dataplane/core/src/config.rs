//! Settings of one data plane instance, parsed once from what the agent sent.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

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
    pub dns: Dns,
    pub on_demand: bool,
    pub original_source: OriginalSource,
    pub localhost_app_tunnel: bool,
    pub response_baggage: bool,
    pub http2: Windows,
    /// None: TCP keepalive is off.
    pub keepalive: Option<Keepalive>,
    pub telemetry: TelemetryConfig,
    /// The node's own address is taken for the kubelet at declared probe ports.
    pub kubelet_probe_fallback: bool,
    /// None: no pod is captured by eBPF.
    pub ebpf: Option<Ebpf>,
}

/// Where this node's programs live in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ebpf {
    pub pods_cgroup: PathBuf,
    /// None: nobody reaches probe ports past the mesh.
    pub kubelet_cgroup: Option<PathBuf>,
    pub folder: PathBuf,
    pub pod_max_pending: u32,
}

/// facts ztunnel 1.1
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    pub outbound: u16,
    pub inbound_plaintext: u16,
    pub inbound_hbone: u16,
    pub dns: u16,
    pub socks5: Option<u16>,
}

/// facts ztunnel 9
#[derive(Clone, Debug, PartialEq)]
pub struct Dns {
    pub cluster_domain: String,
    /// For pods whose own resolv.conf isn't known.
    pub nameservers: Vec<SocketAddr>,
    pub preferred_namespace: Option<String>,
    pub forward_timeout: Duration,
    pub cache_entries: usize,
    pub pod_max_pending: usize,
}

/// Whether applications see the client's address (facts ztunnel 14, ENABLE_ORIG_SRC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OriginalSource {
    Auto,
    Must,
    Never,
}

/// Bytes (facts ztunnel 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    pub stream: u32,
    pub connection: u32,
    pub frame: u32,
}

/// facts ztunnel 1.2
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    pub time: Duration,
    pub interval: Duration,
    pub retries: u32,
    pub user_timeout: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TelemetryConfig {
    /// host:port
    pub otlp_endpoint: Option<String>,
    pub series_ttl: Duration,
    pub istio_version: String,
}

impl TelemetryConfig {
    fn parse(raw: &pb::Telemetry) -> Result<Self, BadConfig> {
        let endpoint = some(&raw.otlp_endpoint);
        Ok(Self {
            otlp_endpoint: endpoint.as_deref().map(collector).transpose()?,
            ..Self::plain(raw)
        })
    }

    fn plain(raw: &pb::Telemetry) -> Self {
        let ttl = match raw.series_ttl_ms {
            0 => 900_000,
            ttl => ttl.into(),
        };
        Self {
            otlp_endpoint: None,
            series_ttl: Duration::from_millis(ttl),
            istio_version: text_or(&raw.istio_version, "unknown"),
        }
    }
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self::plain(&pb::Telemetry::default())
    }
}

impl Ports {
    /// The proxy's own ports: never a destination (facts ztunnel 1.1, `illegal_ports`).
    pub fn is_own(&self, port: u16) -> bool {
        let tcp = [self.outbound, self.inbound_plaintext, self.inbound_hbone];
        tcp.contains(&port) || self.socks5 == Some(port)
    }
}

/// Replaced as a whole by Configure; everybody looks when they need one.
pub type LiveLimits = Arc<ArcSwap<Limits>>;

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
    pub preface_timeout: Duration,
    pub pod_max_handshakes: u32,
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
            dns: port("dns_port", raw.dns_port, 15053)?,
            socks5: match raw.socks5_port {
                0 => None,
                wanted => Some(port("socks5_port", wanted, 0)?),
            },
        };
        let fixed = [ports.outbound, ports.inbound_plaintext, ports.inbound_hbone];
        let mut all: Vec<u16> = fixed
            .into_iter()
            .chain([ports.dns])
            .chain(ports.socks5)
            .collect();
        all.sort_unstable();
        if all.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(BadConfig {
                field: "outbound_port",
                text: format!("the ports must differ: {ports:?}"),
            });
        }
        let dns = raw.dns.clone().unwrap_or_default();
        let http2 = raw.http2.unwrap_or_default();
        let or = |value: u32, default: u32| if value == 0 { default } else { value };
        Ok(Self {
            node: raw.node.clone(),
            network: raw.network.clone(),
            cluster_id: text_or(&raw.cluster_id, "Kubernetes"),
            trust_domain: text_or(&raw.trust_domain, "cluster.local"),
            ports,
            mark: if raw.mark == 0 { 0x539 } else { raw.mark },
            ipv6: !raw.ipv6_disabled,
            limits: Limits::parse(&raw.limits.unwrap_or_default()),
            dns: Dns {
                cluster_domain: text_or(&dns.cluster_domain, "cluster.local").to_lowercase(),
                nameservers: nameservers("dns.nameservers", &dns.nameservers)?,
                preferred_namespace: some(&dns.preferred_namespace),
                forward_timeout: Duration::from_millis(or(dns.forward_timeout_ms, 5000).into()),
                cache_entries: or(dns.cache_entries, 8192) as usize,
                pod_max_pending: or(dns.pod_max_pending, 1024) as usize,
            },
            on_demand: raw.on_demand,
            original_source: match pb::OriginalSource::try_from(raw.original_source) {
                Ok(pb::OriginalSource::Must) => OriginalSource::Must,
                Ok(pb::OriginalSource::Never) => OriginalSource::Never,
                Ok(pb::OriginalSource::Auto) => OriginalSource::Auto,
                Err(_) => {
                    return Err(BadConfig {
                        field: "original_source",
                        text: format!("{} is unknown", raw.original_source),
                    });
                }
            },
            localhost_app_tunnel: !raw.localhost_app_tunnel_off,
            response_baggage: !raw.response_baggage_off,
            http2: windows(&http2)?,
            keepalive: keepalive(&raw.keepalive.unwrap_or_default()),
            telemetry: TelemetryConfig::parse(&raw.telemetry.clone().unwrap_or_default())?,
            kubelet_probe_fallback: raw.kubelet_probe_fallback,
            ebpf: raw.ebpf.as_ref().map(Ebpf::parse).transpose()?,
        })
    }
}

impl Ebpf {
    fn parse(raw: &pb::Ebpf) -> Result<Self, BadConfig> {
        let absolute = |field, text: &String| {
            let path = PathBuf::from(text);
            let fine = path.is_absolute();
            let text = format!("`{text}` is no absolute path");
            if fine {
                Ok(path)
            } else {
                Err(BadConfig { field, text })
            }
        };
        let kubelet = Some(&raw.kubelet_cgroup).filter(|path| !path.is_empty());
        let kubelet = kubelet.map(|path| absolute("ebpf.kubelet_cgroup", path));
        Ok(Self {
            kubelet_cgroup: kubelet.transpose()?,
            pods_cgroup: absolute("ebpf.pods_cgroup", &raw.pods_cgroup)?,
            folder: absolute("ebpf.folder", &raw.folder)?,
            pod_max_pending: match raw.pod_max_pending {
                0 => 16_384,
                wanted => wanted,
            },
        })
    }
}

/// `ip` (port 53) or `ip:port`.
pub fn nameservers(field: &'static str, raw: &[String]) -> Result<Vec<SocketAddr>, BadConfig> {
    let parse = |text: &String| {
        let ip = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
        ip.or_else(|_| text.parse()).map_err(|_| BadConfig {
            field,
            text: format!("`{text}` is no address; write ip or ip:port"),
        })
    };
    raw.iter().map(parse).collect()
}

/// What HTTP/2 can say (RFC 9113 6.5.2, 6.9.2).
fn windows(raw: &pb::Http2) -> Result<Windows, BadConfig> {
    let within = |field, value: u32, default: u32, least: u32, most: u32| match value {
        0 => Ok(default),
        _ if (least..=most).contains(&value) => Ok(value),
        _ => Err(BadConfig {
            field,
            text: format!("{value} is not between {least} and {most} bytes"),
        }),
    };
    let (least, most) = (65_535, (1 << 31) - 1);
    let frame = (1 << 14, (1 << 24) - 1);
    Ok(Windows {
        stream: within(
            "http2.stream_window",
            raw.stream_window,
            4 << 20,
            least,
            most,
        )?,
        connection: within(
            "http2.connection_window",
            raw.connection_window,
            16 << 20,
            least,
            most,
        )?,
        frame: within(
            "http2.frame_size",
            raw.frame_size,
            1 << 20,
            frame.0,
            frame.1,
        )?,
    })
}

/// `http://host:port`; returns host:port.
fn collector(text: &str) -> Result<String, BadConfig> {
    let uri = text.parse::<http::Uri>().ok();
    let uri = uri.filter(|uri| uri.scheme_str() == Some("http") && uri.path() == "/");
    let authority = uri.as_ref().and_then(http::Uri::authority);
    match authority.filter(|authority| authority.port_u16().is_some()) {
        Some(authority) => Ok(authority.to_string()),
        None => Err(BadConfig {
            field: "telemetry.otlp_endpoint",
            text: format!("`{text}` is no collector; write http://host:port"),
        }),
    }
}

fn keepalive(raw: &pb::Keepalive) -> Option<Keepalive> {
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    let seconds = |value: u32| Duration::from_secs(or(value, 180).into());
    let keepalive = Keepalive {
        time: seconds(raw.time_s),
        interval: seconds(raw.interval_s),
        retries: or(raw.retries, 9),
        user_timeout: raw.user_timeout,
    };
    (!raw.off).then_some(keepalive)
}

impl Config {
    /// Err names the first field that is fixed for the life of an instance and differs.
    pub fn same_instance(&self, wanted: &Self) -> Result<(), BadConfig> {
        let same = |field, ours: &dyn ToString, theirs: &dyn ToString| {
            let (ours, theirs) = (ours.to_string(), theirs.to_string());
            if ours == theirs {
                return Ok(());
            }
            let text = format!(
                "this data plane runs with `{ours}`, not `{theirs}`: it can't change live, \
                 replace the data plane"
            );
            Err(BadConfig { field, text })
        };
        let (a, b) = (&self.ports, &wanted.ports);
        same("node", &self.node, &wanted.node)?;
        same("network", &self.network, &wanted.network)?;
        same("cluster_id", &self.cluster_id, &wanted.cluster_id)?;
        same("trust_domain", &self.trust_domain, &wanted.trust_domain)?;
        same("outbound_port", &a.outbound, &b.outbound)?;
        same(
            "inbound_plaintext_port",
            &a.inbound_plaintext,
            &b.inbound_plaintext,
        )?;
        same("inbound_hbone_port", &a.inbound_hbone, &b.inbound_hbone)?;
        same("mark", &self.mark, &wanted.mark)?;
        same("ipv6_disabled", &!self.ipv6, &!wanted.ipv6)?;
        same("dns_port", &a.dns, &b.dns)?;
        let socks5 = |ports: &Ports| ports.socks5.unwrap_or(0);
        same("socks5_port", &socks5(a), &socks5(b))?;
        let text = |value: &dyn std::fmt::Debug| format!("{value:?}");
        same("dns", &text(&self.dns), &text(&wanted.dns))?;
        same("on_demand", &self.on_demand, &wanted.on_demand)?;
        let (ours, theirs) = (self.original_source, wanted.original_source);
        same("original_source", &text(&ours), &text(&theirs))?;
        let (ours, theirs) = (self.localhost_app_tunnel, wanted.localhost_app_tunnel);
        same("localhost_app_tunnel_off", &!ours, &!theirs)?;
        let (ours, theirs) = (self.response_baggage, wanted.response_baggage);
        same("response_baggage_off", &!ours, &!theirs)?;
        same("http2", &text(&self.http2), &text(&wanted.http2))?;
        same(
            "keepalive",
            &text(&self.keepalive),
            &text(&wanted.keepalive),
        )?;
        // Where there is none yet, it may come.
        if let (Some(ours), Some(theirs)) = (&self.ebpf, &wanted.ebpf) {
            same("ebpf", &text(ours), &text(theirs))?;
        }
        same(
            "telemetry",
            &text(&self.telemetry),
            &text(&wanted.telemetry),
        )
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
            preface_timeout: ms(raw.preface_timeout_ms, 10_000),
            pod_max_handshakes: count(raw.pod_max_handshakes, 1024),
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

pub fn canonical_addr(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(canonical(addr.ip()), addr.port())
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

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn text_or(value: &str, default: &str) -> String {
    if value.is_empty() { default } else { value }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> pb::InstanceConfig {
        pb::InstanceConfig {
            node: "n1".into(),
            ..Default::default()
        }
    }

    #[test]
    fn empty_fields_take_their_defaults() {
        let config = Config::parse(&raw()).unwrap();
        assert_eq!(config.ports.outbound, 15001);
        assert_eq!(config.ports.inbound_plaintext, 15006);
        assert_eq!(config.ports.inbound_hbone, 15008);
        assert_eq!(config.mark, 0x539);
        assert_eq!(config.cluster_id, "Kubernetes");
        assert_eq!(config.limits.drain_deadline, Duration::from_secs(5));
        assert!(config.ipv6);
    }

    #[test]
    fn mistakes_name_their_field() {
        let field = |raw: pb::InstanceConfig| Config::parse(&raw).unwrap_err().field;
        assert_eq!(field(pb::InstanceConfig::default()), "node");
        let too_high = pb::InstanceConfig {
            inbound_hbone_port: 70_000,
            ..raw()
        };
        assert_eq!(field(too_high), "inbound_hbone_port");
        let tiny_frame = pb::InstanceConfig {
            http2: Some(pb::Http2 {
                frame_size: 1000,
                ..Default::default()
            }),
            ..raw()
        };
        assert_eq!(field(tiny_frame), "http2.frame_size");
        let huge_window = pb::InstanceConfig {
            http2: Some(pb::Http2 {
                stream_window: 1 << 31,
                ..Default::default()
            }),
            ..raw()
        };
        assert_eq!(field(huge_window), "http2.stream_window");
        let twice = pb::InstanceConfig {
            outbound_port: 15008,
            ..raw()
        };
        assert_eq!(field(twice), "outbound_port");
        for bad in [
            "otel:4317",
            "https://otel:4317",
            "http://otel",
            "http://a:1/x",
            "http://",
        ] {
            let telemetry = pb::Telemetry {
                otlp_endpoint: bad.into(),
                ..Default::default()
            };
            let raw = pb::InstanceConfig {
                telemetry: Some(telemetry),
                ..raw()
            };
            assert_eq!(field(raw), "telemetry.otlp_endpoint", "{bad}");
        }
    }

    #[test]
    fn a_change_of_what_is_fixed_names_the_field_and_limits_may_change() {
        let ours = Config::parse(&raw()).unwrap();
        let differs = |raw: pb::InstanceConfig| {
            ours.same_instance(&Config::parse(&raw).unwrap())
                .map_err(|error| error.field)
        };
        let other_node = pb::InstanceConfig {
            node: "n2".into(),
            ..raw()
        };
        assert_eq!(differs(other_node), Err("node"));
        let other_port = pb::InstanceConfig {
            outbound_port: 16_001,
            ..raw()
        };
        assert_eq!(differs(other_port), Err("outbound_port"));
        let limits = pb::InstanceConfig {
            limits: Some(pb::Limits {
                pool_idle_ms: 7,
                ..Default::default()
            }),
            ..raw()
        };
        assert_eq!(differs(limits), Ok(()));
    }
}
