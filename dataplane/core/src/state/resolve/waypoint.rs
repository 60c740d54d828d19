//! Did an inbound connection come through a waypoint of the workload that it reached?

use std::net::IpAddr;
use std::sync::Arc;

use crate::identity::Identity;
use crate::state::{Gateway, Snapshot, Workload};

/// The peer's certificate and its address must belong to one workload behind the workload's own
/// waypoint or one of its services'. What a waypoint of another network sends comes by a gateway,
/// whose address it has then: of that one the certificate alone can tell, unless the address is of a
/// workload here that has this identity itself. A peer without a certificate is nobody.
pub fn through_waypoint(
    snapshot: &Snapshot,
    network: &str,
    own: &Workload,
    identity: Option<&Identity>,
    source: IpAddr,
) -> bool {
    let Some(identity) = identity else {
        return false;
    };
    let mut direct = snapshot
        .workloads_at(network, source)
        .filter(|peer| peer.has_identity(identity))
        .peekable();
    if direct.peek().is_some() {
        return direct.any(|peer| {
            waypoints(snapshot, own).any(|waypoint| snapshot.leads_to(waypoint, peer))
        });
    }
    let elsewhere = |peer: &Arc<Workload>| *peer.network != *network && peer.has_identity(identity);
    waypoints(snapshot, own).any(|waypoint| snapshot.behind(waypoint).any(elsewhere))
}

/// Those that traffic to the workload may be led through.
pub fn waypoints<'a>(
    snapshot: &'a Snapshot,
    own: &'a Workload,
) -> impl Iterator<Item = &'a Gateway> {
    let services = own.services.iter().filter_map(|membership| {
        let service = snapshot.service(&membership.service)?;
        service.record.as_deref()
    });
    let of_services = services.flat_map(|service| {
        let weighted = service.weighted_waypoints.iter();
        let weighted = weighted.filter(|(_, weight)| *weight > 0);
        let plain = service.waypoint.iter();
        plain.chain(weighted.map(|(gateway, _)| gateway))
    });
    own.waypoint.iter().chain(of_services)
}
