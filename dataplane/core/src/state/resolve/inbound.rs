//! Where an inbound CONNECT ends: steps 4 and 5 of facts ztunnel 3.4.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Authority, Inbound, InboundRefusal};
use crate::config::{Config, canonical};
use crate::state::balance::{PortRule, target_port};
use crate::state::{Gateway, ServiceName, ServiceRecord, Snapshot, Workload};

/// `local` is the local address of the tunnel's socket.
pub fn inbound(
    snapshot: &Snapshot,
    config: &Config,
    own: &Workload,
    local: SocketAddr,
    authority: &Authority,
    forwarded_host: Option<&str>,
) -> Result<Inbound, InboundRefusal> {
    let local = SocketAddr::new(canonical(local.ip()), local.port());
    let tunnel = own.application_tunnel;
    let override_port = tunnel.and_then(|tunnel| tunnel.port);

    let (service, asked, resolved) = match authority {
        Authority::Ip(asked) => {
            let asked = SocketAddr::new(canonical(asked.ip()), asked.port());
            if !is_for(snapshot, config, own, local.ip(), asked.ip()) {
                let authority = asked;
                return Err(InboundRefusal::IpMismatch { authority, local });
            }
            (None, Some(asked), asked.port())
        }
        Authority::Host(host, port) => {
            let service = snapshot
                .service_by_hostname(host, Some(&own.namespace))
                .ok_or_else(|| InboundRefusal::NoHostname(host.clone()))?;
            let resolved = target_port(&service, own, *port, PortRule::Standard)
                // The application takes every port on its one: nothing is left to resolve.
                .or(override_port)
                .ok_or_else(|| InboundRefusal::NoPortForServices {
                    service: service.key.clone(),
                    port: *port,
                })?;
            let vip = vip(&service, config).map(|ip| SocketAddr::new(ip, *port));
            (Some(service), vip, resolved)
        }
    };

    let port = override_port.unwrap_or(resolved);
    let dst = SocketAddr::new(local.ip(), port);
    if config.ports.is_own(resolved) || config.ports.is_own(port) {
        return Err(InboundRefusal::SelfCall(dst));
    }
    let wants_header = tunnel.is_some_and(|tunnel| tunnel.proxy);
    if let (true, None, Some(service)) = (wants_header, asked, &service) {
        let service = service.key.clone();
        return Err(InboundRefusal::NoIpForService { service });
    }
    let named = |service: &ServiceRecord| -> ServiceName { service.name.clone() };
    Ok(Inbound {
        dst,
        connect: match (wants_header && config.localhost_app_tunnel, dst) {
            (false, _) => dst,
            (true, SocketAddr::V4(_)) => (Ipv4Addr::LOCALHOST, port).into(),
            (true, SocketAddr::V6(_)) => (Ipv6Addr::LOCALHOST, port).into(),
        },
        proxy_header: asked.filter(|_| wants_header),
        service: match &service {
            Some(service) => Some(named(service)),
            None => snapshot.attribute_service(own, forwarded_host, dst),
        },
    })
}

/// facts ztunnel 3.5; beyond upstream, weighted waypoints count too.
fn is_for(
    snapshot: &Snapshot,
    config: &Config,
    own: &Workload,
    local: IpAddr,
    asked: IpAddr,
) -> bool {
    if asked == local || own.application_tunnel.is_some() {
        return true;
    }
    let leads_here =
        |waypoint: &Gateway| waypoint.ip() == Some(local) || snapshot.leads_to(waypoint, own);
    if let Some(workload) = snapshot.workload_by_address(&config.network, asked) {
        return workload.waypoint.as_ref().is_some_and(leads_here);
    }
    // Several namespaces may share the address, each with its waypoint.
    let mut services = snapshot.services_at(&config.network, asked);
    services.any(|service| {
        let weighted = service.weighted_waypoints.iter();
        let weighted = weighted.filter(|(_, weight)| *weight > 0);
        let waypoints = service
            .waypoint
            .iter()
            .chain(weighted.map(|(gateway, _)| gateway));
        waypoints.into_iter().any(leads_here)
    })
}

/// Our network's before others, IPv4 before IPv6 (facts ztunnel 3.7).
fn vip(service: &ServiceRecord, config: &Config) -> Option<IpAddr> {
    let vips = service.vips.iter();
    vips.min_by_key(|(network, ip)| (**network != *config.network, ip.is_ipv6()))
        .map(|(_, ip)| *ip)
}
