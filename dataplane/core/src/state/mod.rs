//! What the control plane told us, as an immutable snapshot that readers take without a lock.
//!
//! `Store` is the one writer; it decodes a push resource by resource, changes a copy of the snapshot
//! that shares all it doesn't touch, and swaps it in.

mod apply;
mod balance;
mod delta;
mod demand;
mod dump;
mod gateway;
mod intern;
mod parse;
mod ranges;
pub mod resolve;
mod service;
mod snapshot;
mod store;
mod table;
mod version;
mod workload;

#[cfg(test)]
mod apply_model_test;
#[cfg(test)]
mod apply_test;
#[cfg(test)]
mod balance_test;
#[cfg(test)]
mod dump_test;
#[cfg(test)]
pub mod fixture;
#[cfg(test)]
mod ranges_test;

pub use demand::{Budget, Demand, Told};
pub use gateway::{Destination, Gateway};
pub use parse::{Bad, cidr, port};
pub use service::{Balancing, Families, Membership, PortMap, Service, ServiceName, ServiceRecord};
pub use snapshot::Snapshot;
pub use store::{Applied, Store, TypeState};
pub use workload::{ApplicationTunnel, Common, Locality, Workload};

pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
