//! Routing for one pod. Where the control plane sends only what is asked for, a decision that lacks
//! something waits for it, within bounds, and is made again (facts ztunnel 7.6).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::Early;
use super::pod::Pod;
use crate::state::resolve::{self, Authority, Inbound, InboundRefusal, Refusal, Route};
use crate::state::{Budget, Told, Workload};

/// A service, its waypoint, that one's gateway, and one to spare.
const ROUNDS: usize = 4;

/// A client of DNS asks again, or another server, after five seconds: the nameservers need some.
const NAMES_WAIT: Duration = Duration::from_secs(2);

/// Names that may be asked for on behalf of one pod, and of the peers that call it: a scan of
/// addresses must not fill the memory of the node and of the control plane.
pub struct Budgets {
    own: Budget,
    peers: Budget,
    /// Of DNS questions: a crawler's names must not use up what its connections need.
    names: Budget,
}

impl Default for Budgets {
    fn default() -> Self {
        Self {
            // A crawler's addresses of a day.
            own: Budget::new(16_384),
            peers: Budget::new(256),
            names: Budget::new(2048),
        }
    }
}

impl Pod {
    /// On demand nobody sends the pod's own record unless it was there when the stream began.
    pub fn want_own(&self) {
        let config = &self.shared.config;
        if config.on_demand && self.find_own(&self.shared.store.snapshot()).is_none() {
            let (cluster, info) = (&config.cluster_id, &self.info);
            let uid = format!("{cluster}//Pod/{}/{}", info.namespace, info.name);
            self.shared.store.demand().want(&uid, &self.budgets.own);
        }
    }

    /// `tried`: uids of workloads that are left out of the choice.
    pub async fn route(
        &self,
        own: &Workload,
        client: IpAddr,
        dst: SocketAddr,
        tried: &[Arc<str>],
    ) -> Result<Route, Early> {
        let shared = &self.shared;
        let config = &shared.config;
        let mut asked: Option<String> = None;
        for _ in 0..ROUNDS {
            let snapshot = shared.store.snapshot();
            let route = resolve::outbound(&snapshot, config, own, client, dst, tried);
            match lacking(&route, &config.network).filter(|_| config.on_demand) {
                // Asked for and not there: so it is.
                Some(name) if asked.as_ref() != Some(&name) => {
                    self.demand(&name, &self.budgets.own).await?;
                    asked = Some(name);
                }
                _ => return Ok(route?),
            }
        }
        let snapshot = shared.store.snapshot();
        Ok(resolve::outbound(
            &snapshot, config, own, client, dst, tried,
        )?)
    }

    pub async fn arrival(
        &self,
        own: &Workload,
        local: SocketAddr,
        authority: &Authority,
        forwarded_host: Option<&str>,
    ) -> Result<Inbound, Early> {
        let shared = &self.shared;
        let config = &shared.config;
        let decide = || {
            let snapshot = shared.store.snapshot();
            resolve::inbound(&snapshot, config, own, local, authority, forwarded_host)
        };
        let arrival = decide();
        let Some(name) = lacking_here(&arrival, own, &config.network).filter(|_| config.on_demand)
        else {
            return Ok(arrival?);
        };
        self.demand(&name, &self.budgets.peers).await?;
        Ok(decide()?)
    }

    /// On demand: has these asked for, and waits until all were answered or the time is over. What
    /// isn't told in time counts as unknown; where nothing is told at all, nobody waits.
    pub async fn learn(&self, names: &[String]) {
        let demand = self.shared.store.demand();
        for name in names {
            demand.want(name, &self.budgets.names);
        }
        if demand.is_silent() {
            return;
        }
        let patience = self.limits().workload_wait.min(NAMES_WAIT);
        let end = Instant::now() + patience;
        for name in names {
            let left = end.saturating_duration_since(Instant::now());
            let told = demand.wait(name, left, &self.budgets.names).await;
            self.shared.telemetry.metrics.on_demand(told);
        }
    }

    /// Fails where nothing is known in time: not to know whether a destination is in the mesh is no
    /// reason to talk to it in clear.
    async fn demand(&self, name: &str, budget: &Budget) -> Result<(), Early> {
        let patience = self.limits().workload_wait;
        let demand = self.shared.store.demand();
        let told = demand.wait(name, patience, budget).await;
        self.shared.telemetry.metrics.on_demand(told);
        let name: Arc<str> = name.into();
        match told {
            Told::Answered => Ok(()),
            Told::TimedOut => Err(Early::NotTold { name, patience }),
            Told::Full => Err(Early::TooManyNames { name }),
        }
    }
}

/// The name of what the decision turns on and isn't known.
fn lacking(route: &Result<Route, Refusal>, network: &str) -> Option<String> {
    match route {
        Ok(Route::Passthrough { dst, known: false }) => Some(format!("{network}/{}", dst.ip())),
        Err(Refusal::UnknownWaypoint { waypoint, .. }) => Some(waypoint.clone()),
        Err(Refusal::UnknownNetworkGateway { gateway, .. }) => Some(gateway.clone()),
        _ => None,
    }
}

/// Only what the pod may have to do with: a service that it is in, and an address that it may be
/// the waypoint of.
fn lacking_here(
    arrival: &Result<Inbound, InboundRefusal>,
    own: &Workload,
    network: &str,
) -> Option<String> {
    match arrival {
        Err(InboundRefusal::IpMismatch { authority, .. }) => {
            Some(format!("{network}/{}", authority.ip()))
        }
        Err(InboundRefusal::NoHostname(host)) => {
            let named = |key: &str| {
                let hostname = key.split_once('/').map(|(_, hostname)| hostname);
                hostname.is_some_and(|hostname| hostname.eq_ignore_ascii_case(host))
            };
            let mut services = own.services.iter().map(|m| &*m.service);
            services.find(|key| named(key)).map(str::to_owned)
        }
        _ => None,
    }
}
