//! Where inbound CONNECTs end, and which are refused.

use super::{Authority, Inbound, InboundRefusal, inbound};
use crate::state::Snapshot;
use crate::state::fixture::*;
use crate::wire::workload as wds;

/// A CONNECT that arrives at `shop/web`, 10.0.0.1.
fn arrive(snapshot: &Snapshot, authority: &Authority) -> Result<Inbound, InboundRefusal> {
    let own = uid_of(snapshot, "shop", "web");
    let local = addr("10.0.0.1:15008");
    inbound(snapshot, &config(), &own, local, authority, None)
}

fn to(address: &str) -> Authority {
    Authority::Ip(addr(address))
}

fn host(name: &str, port: u16) -> Authority {
    Authority::Host(name.into(), port)
}

fn web() -> wds::Workload {
    pod("shop", "web", "10.0.0.1")
}

#[test]
fn the_own_address_leads_to_the_application() {
    let snapshot = snapshot_of(Push::addresses().workload(web()));
    let found = arrive(&snapshot, &to("10.0.0.1:8080")).unwrap();
    assert_eq!(found.dst, addr("10.0.0.1:8080"));
    assert_eq!(found.connect, found.dst);
    assert_eq!(found.proxy_header, None);
}

#[test]
fn a_foreign_address_is_a_400() {
    let other = pod("shop", "other", "10.0.0.2");
    let snapshot = snapshot_of(Push::addresses().workload(web()).workload(other));
    for foreign in ["10.0.0.2:8080", "9.9.9.9:80"] {
        let refusal = arrive(&snapshot, &to(foreign)).unwrap_err();
        assert!(matches!(refusal, InboundRefusal::IpMismatch { .. }));
        assert_eq!(refusal.status(), 400);
    }
}

#[test]
fn a_waypoint_accepts_what_it_is_the_waypoint_of() {
    let gateway = service("shop", "web", "10.1.0.1");
    let own = member(web(), &gateway, &[]);
    let weighted = |weight| wds::WeightedWaypoint {
        destination: Some(gateway_named("shop", "web.shop.svc.cluster.local")),
        weight,
    };
    let mut by_name = pod("shop", "by-name", "10.0.0.2");
    by_name.waypoint = Some(gateway_named("shop", "web.shop.svc.cluster.local"));
    let mut by_vip = pod("shop", "by-vip", "10.0.0.3");
    by_vip.waypoint = Some(gateway_at("10.1.0.1", 15008));
    let mut by_address = service("shop", "by-address", "10.1.0.4");
    by_address.waypoint = Some(gateway_at("10.0.0.1", 15008));
    let mut by_weight = service("shop", "by-weight", "10.1.0.5");
    by_weight.weighted_waypoints = vec![weighted(1)];
    let mut shared = service("shop", "shared", "10.1.0.5");
    shared.canonical = true;
    let mut never = service("shop", "never", "10.1.0.6");
    never.weighted_waypoints = vec![weighted(0)];
    let snapshot = snapshot_of(
        Push::addresses()
            .service(gateway)
            .workload(own)
            .workload(by_name)
            .workload(by_vip)
            .service(by_address)
            .service(by_weight)
            .service(shared)
            .service(never),
    );
    for served in ["10.0.0.2:80", "10.0.0.3:80", "10.1.0.4:80", "10.1.0.5:80"] {
        let found = arrive(&snapshot, &to(served)).expect(served);
        assert_eq!(
            found.dst,
            addr("10.0.0.1:80"),
            "always the tunnel's own address"
        );
    }
    assert!(arrive(&snapshot, &to("10.1.0.6:80")).is_err());
}

#[test]
fn a_hostname_is_resolved_without_regard_to_case() {
    let service = service("shop", "web", "10.1.0.1");
    let mapped = member(web(), &service, &[port(80, 9000)]);
    let snapshot = snapshot_of(Push::addresses().service(service.clone()).workload(mapped));
    let found = arrive(&snapshot, &host("WEB.shop.svc.Cluster.local", 80)).unwrap();
    assert_eq!(found.dst, addr("10.0.0.1:9000"));
    assert_eq!(&*found.service.unwrap().name, "web");

    let snapshot = snapshot_of(Push::addresses().service(service).workload(web()));
    let found = arrive(&snapshot, &host("web.shop.svc.cluster.local", 80)).unwrap();
    assert_eq!(found.dst, addr("10.0.0.1:8080"));
    let refused = |authority| arrive(&snapshot, &authority).unwrap_err();
    let refusal = refused(host("web.shop.svc.cluster.local", 81));
    assert!(matches!(
        refusal,
        InboundRefusal::NoPortForServices { port: 81, .. }
    ));
    assert_eq!(refusal.status(), 503);
    let refusal = refused(host("nobody.example", 80));
    assert_eq!(refusal, InboundRefusal::NoHostname("nobody.example".into()));
    assert_eq!(refusal.status(), 503);
}

#[test]
fn the_proxys_own_ports_are_refused() {
    let snapshot = snapshot_of(Push::addresses().workload(web()));
    for port in [15001, 15006, 15008] {
        let refusal = arrive(&snapshot, &to(&format!("10.0.0.1:{port}"))).unwrap_err();
        assert!(matches!(refusal, InboundRefusal::SelfCall(_)));
        assert_eq!(refusal.status(), 503);
    }
}

#[test]
fn an_application_tunnel_takes_everything_on_its_port() {
    let tunnel = |protocol: wds::application_tunnel::Protocol, port| {
        let mut web = web();
        web.application_tunnel = Some(wds::ApplicationTunnel {
            protocol: protocol as i32,
            port,
        });
        snapshot_of(Push::addresses().workload(web))
    };
    use wds::application_tunnel::Protocol;
    let found = arrive(&tunnel(Protocol::None, 15088), &to("9.9.9.9:80")).unwrap();
    assert_eq!(found.connect, addr("10.0.0.1:15088"));
    assert_eq!(found.proxy_header, None);

    let found = arrive(&tunnel(Protocol::Proxy, 0), &to("9.9.9.9:80")).unwrap();
    assert_eq!(
        found.dst,
        addr("10.0.0.1:80"),
        "policies see the pod's address"
    );
    assert_eq!(found.connect, addr("127.0.0.1:80"));
    assert_eq!(found.proxy_header, Some(addr("9.9.9.9:80")));
}

/// facts ztunnel 3.8
#[test]
fn the_service_is_the_forwarded_host_else_the_first_with_the_port() {
    let mut a = service("shop", "a", "10.1.0.1");
    a.ports = vec![port(80, 8080)];
    let mut b = service("shop", "b", "10.1.0.2");
    b.ports = vec![port(80, 8080), port(90, 0)];
    let own = member(member(web(), &a, &[]), &b, &[port(90, 9090)]);
    let snapshot = snapshot_of(Push::addresses().service(a).service(b).workload(own));
    let own = uid_of(&snapshot, "shop", "web");
    let name = |host: Option<&str>, dst: &str| {
        let found = snapshot.attribute_service(&own, host, addr(dst));
        found.map(|service| service.name.to_string())
    };
    assert_eq!(name(None, "10.0.0.1:8080").as_deref(), Some("a"));
    let b = Some("B.shop.svc.cluster.local");
    assert_eq!(name(b, "10.0.0.1:8080").as_deref(), Some("b"));
    assert_eq!(name(None, "10.0.0.1:9090").as_deref(), Some("b"));
    assert_eq!(name(None, "10.0.0.1:7"), None);
    assert_eq!(
        name(Some("elsewhere"), "10.0.0.1:8080").as_deref(),
        Some("a")
    );
}

#[test]
fn a_named_port_of_a_hostname_is_what_the_workload_maps_it_to() {
    let mut service = service("shop", "web", "10.1.0.1");
    service.ports = vec![port(80, 0), port(81, 0)];
    let mapped = member(web(), &service, &[port(80, 9000)]);
    let snapshot = snapshot_of(Push::addresses().service(service).workload(mapped));
    let name = "web.shop.svc.cluster.local";
    let found = arrive(&snapshot, &host(name, 80)).unwrap();
    assert_eq!(found.dst, addr("10.0.0.1:9000"));
    let refusal = arrive(&snapshot, &host(name, 81)).unwrap_err();
    assert!(matches!(
        refusal,
        InboundRefusal::NoPortForServices { port: 81, .. }
    ));
}

#[test]
fn of_services_with_one_hostname_the_workloads_namespace_decides() {
    let at = |namespace: &str, target| {
        let mut it = service(namespace, "web", "10.1.0.1");
        it.hostname = "web.example".into();
        it.ports = vec![port(80, target)];
        it
    };
    let mut hidden = at("other", 1111);
    hidden.visibility = wds::service::Visibility::Namespace as i32;
    let push = Push::addresses().workload(web()).service(hidden);
    let snapshot = snapshot_of(push);
    let refusal = arrive(&snapshot, &host("web.example", 80)).unwrap_err();
    assert_eq!(refusal, InboundRefusal::NoHostname("web.example".into()));

    let push = Push::addresses().workload(web()).service(at("other", 1111));
    let snapshot = snapshot_of(push.service(at("shop", 2222)));
    let found = arrive(&snapshot, &host("web.example", 80)).unwrap();
    assert_eq!(found.dst, addr("10.0.0.1:2222"));
    assert_eq!(&*found.service.unwrap().namespace, "shop");
}

/// Somebody else's waypoint is no reason to take the traffic.
#[test]
fn what_another_waypoint_serves_is_refused() {
    let mut gateway = service("shop", "other", "10.1.0.1");
    gateway.ports = vec![port(15008, 15008)];
    let elsewhere = member(pod("shop", "other", "10.0.0.9"), &gateway, &[]);
    let name = "other.shop.svc.cluster.local";
    let mut workload = pod("shop", "by-name", "10.0.0.2");
    workload.waypoint = Some(gateway_named("shop", name));
    let mut service = service("shop", "by-address", "10.1.0.4");
    service.waypoint = Some(gateway_at("10.0.0.9", 15008));
    let plain = pod("shop", "plain", "10.0.0.3");
    let push = Push::addresses().workload(web()).service(gateway);
    let push = push.workload(elsewhere).workload(workload);
    let snapshot = snapshot_of(push.service(service).workload(plain));
    for foreign in ["10.0.0.2:80", "10.1.0.4:80", "10.0.0.3:80", "10.1.0.1:80"] {
        let refusal = arrive(&snapshot, &to(foreign)).unwrap_err();
        assert!(
            matches!(refusal, InboundRefusal::IpMismatch { .. }),
            "{foreign}"
        );
    }
}

/// facts ztunnel 3.7
#[test]
fn an_app_that_is_called_by_hostname_is_told_an_address_of_the_service() {
    let tunnelled = || {
        let mut web = web();
        web.application_tunnel = Some(wds::ApplicationTunnel {
            protocol: wds::application_tunnel::Protocol::Proxy as i32,
            port: 15088,
        });
        web
    };
    let mut service = service("shop", "web", "10.1.0.1");
    let mut far = vip_of("10.2.0.1");
    far.network = "far".into();
    let header = |addresses: Vec<wds::NetworkAddress>, service: &mut wds::Service| {
        service.addresses = addresses;
        let push = Push::addresses().service(service.clone());
        let snapshot = snapshot_of(push.workload(tunnelled()));
        arrive(&snapshot, &host("web.shop.svc.cluster.local", 80))
    };
    let (v4, v6) = (vip_of("10.1.0.1"), vip_of("2001:db8::1"));
    let found = header(vec![far.clone(), v6.clone(), v4], &mut service).unwrap();
    assert_eq!(found.proxy_header, Some(addr("10.1.0.1:80")));
    assert_eq!(found.connect, addr("127.0.0.1:15088"));
    assert_eq!(found.dst, addr("10.0.0.1:15088"));
    let found = header(vec![far.clone(), v6], &mut service).unwrap();
    assert_eq!(found.proxy_header, Some(addr("[2001:db8::1]:80")));
    let found = header(vec![far], &mut service).unwrap();
    assert_eq!(found.proxy_header, Some(addr("10.2.0.1:80")));
    let refusal = header(vec![], &mut service).unwrap_err();
    assert!(matches!(refusal, InboundRefusal::NoIpForService { .. }));
    assert_eq!(refusal.status(), 503);
}
