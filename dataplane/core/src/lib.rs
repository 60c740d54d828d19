//! The data plane of an Underpass node: everything that happens per connection and per byte.
//!
//! It knows nothing of Kubernetes, istiod or files: pods, resources and certificates reach it over
//! the control socket (`control`), and it keeps serving with what it last knew.

pub mod capture;
pub mod config;
pub mod control;
pub mod dns;
pub mod explain;
pub mod hbone;
pub mod identity;
pub mod inpod;
pub mod policy;
pub mod prove;
pub mod proxy;
pub mod state;
pub mod telemetry;
pub mod tls;
pub mod wire;
