//! What is dialled: an address, or a name that the mesh gives an address.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use super::source::Caller;
use super::steps::Steps;
use super::{Known, Unclear};
use crate::config::canonical;
use crate::state::ServiceRecord;

pub enum Wanted {
    Addr(SocketAddr),
    Host(String, u16),
}

impl Wanted {
    pub fn parse(text: &str) -> Result<Self, Unclear> {
        let bad = || Unclear::Destination(text.to_owned());
        if let Ok(addr) = SocketAddr::from_str(text) {
            let addr = SocketAddr::new(canonical(addr.ip()), addr.port());
            return (addr.port() != 0)
                .then_some(Self::Addr(addr))
                .ok_or_else(bad);
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(bad)?;
        let plausible = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if host.is_empty() || !host.bytes().all(plausible) {
            return Err(bad());
        }
        Ok(Self::Host(host.trim_end_matches('.').to_owned(), port))
    }

    /// None where only a DNS server knows.
    pub fn resolve(
        self,
        known: &Known<'_>,
        caller: &Caller,
        steps: &mut Steps,
    ) -> Option<SocketAddr> {
        let (host, port) = match self {
            Self::Addr(addr) => return Some(addr),
            Self::Host(host, port) => (host, port),
        };
        let namespace = &*caller.workload.namespace;
        let domain = &known.config.dns.cluster_domain;
        // As a pod's search list would try it, and as it was said.
        let names = [
            host.clone(),
            format!("{host}.{namespace}.svc.{domain}"),
            format!("{host}.svc.{domain}"),
        ];
        let snapshot = known.snapshot;
        let mut services = names.iter();
        let service = services.find_map(|name| snapshot.service_by_hostname(name, Some(namespace)));
        if let Some(service) = service {
            return of_service(known, caller, &service, port, steps);
        }
        let mut names = names.iter();
        let workload = names.find_map(|name| snapshot.workload_by_hostname(namespace, name));
        let address = workload.as_ref().and_then(|w| w.addresses.first());
        if let Some(ip) = address {
            steps.ok("name", &host, format!("a workload's hostname: {ip}"));
            return Some(SocketAddr::new(*ip, port));
        }
        let text = format!(
            "no service of this name is known to namespace {namespace}: what DNS answers is what \
             is dialled; ask with that address"
        );
        steps.unknown("name", &host, text);
        None
    }
}

fn of_service(
    known: &Known<'_>,
    caller: &Caller,
    service: &Arc<ServiceRecord>,
    port: u16,
    steps: &mut Steps,
) -> Option<SocketAddr> {
    let subject = &*service.key;
    let network = &*known.config.network;
    let rank = |(of, ip): &&(Arc<str>, IpAddr)| (**of != *network, ip.is_ipv6());
    if let Some((_, ip)) = service.vips.iter().min_by_key(rank) {
        steps.ok(
            "name",
            subject,
            format!("{} is {ip}", service.name.hostname),
        );
        return Some(SocketAddr::new(*ip, port));
    }
    let endpoints = known.snapshot.service(&service.key);
    let addresses = endpoints
        .iter()
        .flat_map(|s| s.endpoints.iter())
        .filter(|w| w.network == caller.workload.network)
        .flat_map(|w| w.addresses.iter().map(|ip| (w.uid.clone(), *ip)));
    let Some((uid, ip)) = addresses.min() else {
        let text = "the service has no address of its own and no endpoint: the name has no address";
        steps.refused("name", subject, text, "see underpass services -o wide");
        return None;
    };
    let text = format!("headless: DNS gives the endpoints' addresses, such as {ip} of {uid}");
    steps.ok("name", subject, text);
    Some(SocketAddr::new(ip, port))
}
