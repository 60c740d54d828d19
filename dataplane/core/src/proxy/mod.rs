//! The three ways through a pod's proxy: outbound, inbound HBONE, inbound plaintext.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{Config, Limits};
use crate::inpod::{Listeners, Netns, PodInfo};
use crate::state::Store;
use crate::telemetry::Telemetry;
use crate::tls::CertStore;
use crate::wire::control as pb;

/// What all proxies of the process share.
pub struct Shared {
    pub config: Arc<Config>,
    /// Replaced by Configure.
    pub limits: arc_swap::ArcSwap<Limits>,
    pub store: Arc<Store>,
    pub certs: Arc<CertStore>,
    pub telemetry: Arc<Telemetry>,
}

/// One pod's proxy. Bind is not serve: nothing is accepted before `serve`.
pub struct PodProxy {}

impl PodProxy {
    pub fn new(_shared: Arc<Shared>, _pod: PodInfo, _netns: Arc<Netns>) -> Arc<Self> {
        unimplemented!()
    }

    /// Accepts on these from now on, and watches policies and workloads for live connections.
    pub fn serve(self: &Arc<Self>, _listeners: Listeners) {}

    /// Stops accepting and closes our listening descriptors; connections stay.
    pub fn stop_accepting(&self) {}

    /// GOAWAY on tunnels; returns when all connections ended, cutting what is left at the deadline.
    pub async fn drain(&self, _deadline: Duration) {}

    /// Ends everything now. After it returns no task of this pod runs.
    pub async fn cut(&self) {}

    pub fn connections(&self) -> Vec<pb::Connection> {
        unimplemented!()
    }

    /// (inbound, outbound)
    pub fn connection_counts(&self) -> (u32, u32) {
        unimplemented!()
    }
}
