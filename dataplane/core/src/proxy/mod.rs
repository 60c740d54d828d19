//! The three ways through a pod's proxy: outbound, inbound HBONE, inbound plaintext.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, watch};

use crate::config::{Config, LiveLimits};
use crate::dns::{self, Cache, Resolv, Resolver};
use crate::hbone::{Dial, Http2, Pool};
use crate::inpod::{Descriptors, DnsSockets, Listeners, Netns, PodInfo, Redirected};
use crate::state::Store;
use crate::telemetry::{Flush, Telemetry};
use crate::tls::CertStore;
use crate::wire::control as pb;

mod accept;
mod attempt;
mod authority;
mod baggage;
mod connection;
mod copy;
mod enforcement;
mod error;
mod forwarded;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod inbound;
mod inbound_plaintext;
mod kubelet;
mod labels;
mod names;
mod outbound;
mod pod;
pub(crate) mod proof;
mod proxy_protocol;
mod recheck;
mod registry;
mod route;
mod socks5;
mod tasks;
mod traceparent;
mod verdict;

#[cfg(test)]
mod boundary_tests;
#[cfg(test)]
mod bounds_tests;
#[cfg(test)]
mod e2e_tests;
#[cfg(test)]
mod endpoint_tests;
#[cfg(test)]
mod enforcement_tests;
#[cfg(test)]
mod flags_tests;
#[cfg(test)]
mod kubelet_tests;
#[cfg(test)]
mod network_tests;
#[cfg(test)]
mod route_tests;
#[cfg(test)]
mod settings_tests;
#[cfg(test)]
mod socks5_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod trust_tests;
#[cfg(test)]
mod verdict_tests;

use accept::Fate;
pub use accept::Loss;
pub use enforcement::{Demands, Enforcement};
pub use kubelet::NodeAddresses;
pub use names::Names;
pub(crate) use pod::Pod;
use proof::Proofs;
use registry::Registry;
use route::Budgets;
pub(crate) use tasks::Tasks;
use tasks::sized;

/// Told and not yet taken; a pod has six listeners, each lost once a second at most.
const LOSSES: usize = 16;

/// What all proxies of the process share.
pub struct Shared {
    pub config: Arc<Config>,
    /// Replaced by Configure.
    pub limits: LiveLimits,
    /// Of the process, shared among pods.
    pub descriptors: Arc<Descriptors>,
    pub names: Names,
    pub store: Arc<Store>,
    pub certs: Arc<CertStore>,
    pub telemetry: Arc<Telemetry>,
    pub dns_cache: Cache,
    pub node: NodeAddresses,
}

/// One pod's proxy. Bind is not serve: nothing is accepted before `serve`.
pub struct PodProxy {
    pod: Arc<Pod>,
    /// Connections, tunnels, and streams in tunnels: what a drain waits for.
    traffic: Arc<Tasks>,
    /// Accept loops and the watch over policies.
    service: Tasks,
    resolver: Arc<Resolver>,
    stop: watch::Sender<bool>,
    /// Present while DNS is served.
    stop_dns: Mutex<Option<watch::Sender<bool>>>,
    drain: watch::Sender<bool>,
    served: AtomicBool,
    /// Of its listeners.
    fate: Fate,
    losses: Mutex<Option<mpsc::Receiver<Loss>>>,
}

impl PodProxy {
    /// Of the listener for plaintext.
    pub fn inbound_port(&self) -> u16 {
        self.pod.shared.config.ports.inbound_plaintext
    }

    pub fn new(shared: Arc<Shared>, pod: PodInfo, netns: Arc<Netns>) -> Arc<Self> {
        let registry = Arc::new(Registry::of(&pod.uid));
        let telemetry = shared.telemetry.clone();
        let source: Weak<dyn Flush> = Arc::downgrade(&registry) as _;
        telemetry.before_scrape(source);
        let http2 = Http2::from(&shared.config.http2);
        let sockets = shared.descriptors.share();
        let pool = Pool::new(
            shared.limits.clone(),
            http2.clone(),
            dial(shared.config.clone(), netns.clone()),
            sockets.clone(),
            telemetry.metrics.bounds.clone(),
        );
        let panics = &telemetry.metrics.panics;
        let (traffic, service) = (Tasks::new(panics.clone()), Tasks::new(panics.clone()));
        let pod = Arc::new(Pod {
            shared,
            info: pod,
            netns,
            pool,
            http2,
            sockets,
            registry,
            demands: arc_swap::ArcSwap::default(),
            demanded: Notify::new(),
            probe_ports: arc_swap::ArcSwap::default(),
            budgets: Budgets::default(),
            proofs: Proofs::default(),
        });
        let (losses, lost) = mpsc::channel(LOSSES);
        let metrics = &pod.shared.telemetry.metrics;
        let fate = Fate {
            accept_errors: metrics.accept_errors.clone(),
            lost: metrics.listeners_lost.clone(),
            losses,
        };
        let proxy = Arc::new(Self {
            fate,
            losses: Mutex::new(Some(lost)),
            traffic: Arc::new(traffic),
            service,
            resolver: Resolver::new(pod.clone()),
            pod,
            stop_dns: Mutex::default(),
            stop: watch::Sender::new(false),
            drain: watch::Sender::new(false),
            served: AtomicBool::new(false),
        });
        proxy.pod.want_own();
        proxy
    }

    /// Accepts on these from now on, and watches policies and workloads for live connections.
    pub fn serve(self: &Arc<Self>, listeners: Listeners) {
        let Listeners {
            inbound_hbone,
            redirected,
        } = listeners;
        let (pod, traffic) = (&self.pod, &self.traffic);
        if !self.served.swap(true, Relaxed) {
            let metrics = &pod.shared.telemetry.metrics;
            metrics.proxies_active.inc();
            metrics.proxies_started.inc();
            let changes = pod.shared.store.subscribe();
            self.service.spawn(recheck::watch(pod.clone(), changes));
        }
        if let Some(redirected) = redirected {
            self.serve_redirected(redirected);
        }
        let incoming = pod.shared.telemetry.metrics.destination_sockets.clone();
        let (p, t, drain) = (pod.clone(), traffic.clone(), self.drain.subscribe());
        self.listen(inbound_hbone, move |stream, peer| {
            let (pod, tasks) = (p.clone(), t.clone());
            let tunnel = inbound::handle(pod, tasks, drain.clone(), stream, peer);
            t.spawn_counted(&incoming, sized::<4096, _>(tunnel));
        });
    }

    fn serve_redirected(&self, listeners: Redirected) {
        let Redirected {
            outbound,
            inbound_plaintext,
            socks5,
        } = listeners;
        let (pod, traffic) = (&self.pod, &self.traffic);
        let metrics = &pod.shared.telemetry.metrics;
        let outgoing = metrics.source_sockets.clone();
        let (p, t) = (pod.clone(), traffic.clone());
        self.listen(outbound, move |stream, peer| {
            let handle = outbound::handle(p.clone(), stream, peer);
            t.spawn_counted(&outgoing, sized::<1300, _>(handle));
        });
        let open = metrics.destination_sockets.clone();
        let (p, t) = (pod.clone(), traffic.clone());
        self.listen(inbound_plaintext, move |stream, peer| {
            let handle = inbound_plaintext::handle(p.clone(), stream, peer);
            t.spawn_counted(&open, sized::<1024, _>(handle));
        });
        if let Some(socks5) = socks5 {
            let (p, t, open) = (pod.clone(), traffic.clone(), metrics.source_sockets.clone());
            self.listen(socks5, move |stream, peer| {
                let handle = socks5::handle(p.clone(), stream, peer);
                t.spawn_counted(&open, sized::<1600, _>(handle));
            });
        }
    }

    /// Holds for new connections at once, and live inbound ones are asked again.
    pub fn demand(&self, demands: Demands) {
        if **self.pod.demands.load() != demands {
            self.pod.demands.store(Arc::new(demands));
            self.pod.demanded.notify_one();
        }
    }

    /// Where the kubelet may be taken for itself by its address.
    pub fn probed_at(&self, ports: Vec<u16>) {
        self.pod.probe_ports.store(Arc::new(ports));
    }

    /// Answers DNS on these from now on, instead of on those before.
    pub fn serve_dns(&self, sockets: DnsSockets) {
        let stop = watch::Sender::new(false);
        for socket in sockets.udp {
            let (resolver, tasks) = (self.resolver.clone(), self.traffic.clone());
            let serve = dns::udp(resolver, tasks, socket, stop.subscribe());
            self.service.spawn(serve);
        }
        for listener in sockets.tcp {
            let (resolver, tasks) = (self.resolver.clone(), self.traffic.clone());
            let each =
                move |stream, _| tasks.spawn(sized::<1536, _>(dns::tcp(resolver.clone(), stream)));
            self.service.spawn(accept::accept_loop(
                listener,
                stop.subscribe(),
                self.fate.clone(),
                each,
            ));
        }
        *self.stop_dns.lock() = Some(stop);
    }

    /// Closes our DNS sockets; questions that wait are still answered.
    pub fn stop_dns(&self) {
        if let Some(stop) = self.stop_dns.lock().take() {
            stop.send_replace(true);
        }
    }

    /// Of the pod itself, None where it isn't known.
    pub fn configure_dns(&self, resolv: Option<Resolv>) {
        self.resolver.configure(resolv);
    }

    fn listen(
        &self,
        listener: TcpListener,
        each: impl Fn(TcpStream, std::net::SocketAddr) + Send + Sync + 'static,
    ) {
        let (stop, fate) = (self.stop.subscribe(), self.fate.clone());
        self.service
            .spawn(accept::accept_loop(listener, stop, fate, each));
    }

    /// Listeners that are lost from now on, for one taker; ends with the pod.
    pub fn losses(&self) -> Option<mpsc::Receiver<Loss>> {
        self.losses.lock().take()
    }

    /// Stops accepting and closes our listening descriptors; connections stay.
    pub fn stop_accepting(&self) {
        self.stop.send_replace(true);
        self.stop_dns();
    }

    /// GOAWAY on tunnels; returns when all connections ended, cutting what is left when time is out.
    pub async fn drain(&self, out_of_time: impl Future<Output = ()>) {
        self.stop_accepting();
        self.drain.send_replace(true);
        // The pool stays open: connections accepted a moment ago are still to be served. What is
        // left at the deadline is cut, so that it ran out makes no other difference.
        tokio::select! {
            () = self.traffic.none_left() => {}
            () = out_of_time => {}
        }
        self.cut().await;
    }

    /// Ends everything now. After it returns no task of this pod runs.
    pub async fn cut(&self) {
        self.stop_accepting();
        self.service.cut();
        self.traffic.cut();
        self.pod.pool.cut();
        self.service.none_left().await;
        self.traffic.none_left().await;
        self.pod.pool.gone().await;
        if self.served.swap(false, Relaxed) {
            let metrics = &self.pod.shared.telemetry.metrics;
            metrics.proxies_active.dec();
            metrics.proxies_stopped.inc();
        }
    }

    pub fn connections(&self) -> Vec<pb::Connection> {
        let pod = &self.pod;
        let describe = |connection: Arc<connection::Connection>| connection.describe(&pod.info.uid);
        pod.registry.each_shard().flatten().map(describe).collect()
    }

    /// Connections that prove its capture.
    pub fn proofs(&self) -> &Proofs {
        &self.pod.proofs
    }

    /// (inbound, outbound)
    pub fn connection_counts(&self) -> (u32, u32) {
        self.pod.registry.counts()
    }
}

/// Connections made by the pool leave from inside the pod.
fn dial(config: Arc<Config>, netns: Arc<Netns>) -> Dial {
    Arc::new(move |dst| {
        let (config, netns) = (config.clone(), netns.clone());
        let connect = async move { netns.connect(&config, dst, None).await };
        Box::pin(connect) as Pin<Box<_>>
    })
}
