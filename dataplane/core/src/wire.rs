//! Wire types generated from `proto/`; nothing else.

#[allow(clippy::all)]
pub mod workload {
    include!(concat!(env!("OUT_DIR"), "/istio.workload.rs"));
}

#[allow(clippy::all)]
pub mod security {
    include!(concat!(env!("OUT_DIR"), "/istio.security.rs"));
}

#[allow(clippy::all)]
pub mod discovery {
    include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
}

#[allow(clippy::all)]
pub mod control {
    include!(concat!(env!("OUT_DIR"), "/underpass.control.rs"));
}

#[allow(clippy::all)]
pub mod otlp {
    include!(concat!(env!("OUT_DIR"), "/underpass.otlp.rs"));
}
