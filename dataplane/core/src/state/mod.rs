//! What the control plane told us, as an immutable snapshot that readers take without a lock.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::config::Config;
use crate::identity::Identity;

pub mod resolve;

/// One writer (`apply`, serialised inside), many readers.
pub struct Store {
    _config: Arc<Config>,
}

/// A consistent view of workloads, services and policies. Cheap to clone.
#[derive(Clone, Default)]
pub struct Snapshot {}

/// A WDS workload record, parsed.
pub struct Workload {
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub trust_domain: Arc<str>,
    pub cluster_id: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub workload_name: Arc<str>,
    /// Lower case: deployment, cronjob, pod, job.
    pub workload_type: &'static str,
    pub network: Arc<str>,
    pub node: Arc<str>,
    pub hostname: Arc<str>,
    pub addresses: smallvec::SmallVec<[IpAddr; 2]>,
    pub hbone: bool,
    pub locality: Locality,
    /// Policy resource names this workload lists.
    pub authorization_policies: Arc<[Arc<str>]>,
    // … the rest of the record is the state part's business.
}

#[derive(Clone, Default, PartialEq, Eq)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// The names of a service that logs and metrics show.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceName {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
}

/// What `apply` did with one delta response.
#[derive(Debug, Default)]
pub struct Applied {
    pub type_url: String,
    pub nonce: String,
    pub accepted: u32,
    pub removed: u32,
    /// (resource name, reason)
    pub rejected: Vec<(String, String)>,
    /// This was the first response of its type.
    pub first: bool,
}

/// Version and rejection bookkeeping of one xDS type, for Hello.
#[derive(Debug, Default, Clone)]
pub struct TypeState {
    pub type_url: String,
    pub processed: bool,
    pub versions: Vec<(String, String)>,
    pub rejected: Vec<(String, String)>,
}

impl Workload {
    pub fn identity(&self) -> Identity {
        Identity::new(
            self.trust_domain.clone(),
            self.namespace.clone(),
            self.service_account.clone(),
        )
    }
}

impl Store {
    pub fn new(config: Arc<Config>) -> Arc<Self> {
        Arc::new(Self { _config: config })
    }

    /// Wait-free.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        unimplemented!()
    }

    /// Decodes and applies the raw bytes of a DeltaDiscoveryResponse. CPU-bound: run it off the
    /// workers (spawn_blocking); readers are never blocked.
    pub fn apply(&self, _response: bytes::Bytes) -> Result<Applied, prost::DecodeError> {
        unimplemented!()
    }

    /// Changes after every applied response that altered a workload, service or policy.
    pub fn subscribe(&self) -> tokio::sync::watch::Receiver<u64> {
        unimplemented!()
    }

    pub fn types(&self) -> Vec<TypeState> {
        unimplemented!()
    }

    /// One section of the dump (facts ztunnel 13.1) as JSON text, in chunks of about 64 kB:
    /// workloads, services, policies. None for an unknown section.
    pub fn dump(&self, _section: &str) -> Option<Box<dyn Iterator<Item = Vec<u8>> + Send>> {
        unimplemented!()
    }
}

impl Snapshot {
    pub fn workload_by_address(&self, _network: &str, _ip: IpAddr) -> Option<Arc<Workload>> {
        unimplemented!()
    }

    pub fn workload_by_uid(&self, _uid: &str) -> Option<Arc<Workload>> {
        unimplemented!()
    }

    /// The record of a pod of this node (facts ztunnel 2.1 step 3).
    pub fn local_workload(
        &self,
        _namespace: &str,
        _name: &str,
        _service_account: &str,
    ) -> Option<Arc<Workload>> {
        unimplemented!()
    }

    /// For metric attribution of inbound connections (facts ztunnel 3.8).
    pub fn attribute_service(
        &self,
        _workload: &Workload,
        _forwarded_host: Option<&str>,
        _dst: SocketAddr,
    ) -> Option<ServiceName> {
        unimplemented!()
    }
}
