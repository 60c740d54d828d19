//! The DNS proxy of a pod (facts ztunnel 9): names of the mesh are answered here, all others are
//! relayed to the pod's nameservers.
//!
//! `server` takes questions from the pod, `names` and `lookup` find what the mesh knows, `answer`
//! writes it, `relay` asks the nameservers, and `cache` keeps what they say.

mod answer;
mod cache;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod lookup;
mod names;
mod relay;
mod resolver;
mod server;
mod wire;

#[cfg(test)]
mod demand_tests;
#[cfg(test)]
mod lookup_tests;
#[cfg(test)]
mod relay_tests;
#[cfg(test)]
mod testing;

pub use cache::Cache;
pub use resolver::{Resolv, Resolver};
pub use server::{tcp, udp};
