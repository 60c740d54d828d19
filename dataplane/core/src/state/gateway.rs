//! A reference to a waypoint or network gateway, as records carry it.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::intern::Interner;
use super::parse::{Bad, ip, port};
use crate::wire::workload as wds;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Gateway {
    pub destination: Destination,
    pub hbone_port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    Address {
        network: Arc<str>,
        ip: IpAddr,
    },
    Hostname {
        namespace: Arc<str>,
        hostname: Arc<str>,
        /// `namespace/hostname`, the name of the service.
        key: Arc<str>,
    },
}

impl Gateway {
    pub fn parse(
        field: &str,
        raw: &wds::GatewayAddress,
        interner: &mut Interner,
    ) -> Result<Self, Bad> {
        use wds::gateway_address::Destination as Raw;
        let destination = match &raw.destination {
            None => return Err(Bad::new(field, "it has neither an address nor a hostname")),
            Some(Raw::Address(raw)) => Destination::Address {
                network: interner.text(&raw.network),
                ip: ip(field, &raw.address)?,
            },
            Some(Raw::Hostname(raw)) => Destination::Hostname {
                namespace: interner.text(&raw.namespace),
                hostname: interner.text(&raw.hostname),
                key: interner.text(&format!("{}/{}", raw.namespace, raw.hostname)),
            },
        };
        Ok(Self {
            destination,
            hbone_port: port(field, raw.hbone_mtls_port)?,
        })
    }
}

impl Gateway {
    pub fn ip(&self) -> Option<IpAddr> {
        match self.destination {
            Destination::Address { ip, .. } => Some(ip),
            Destination::Hostname { .. } => None,
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { network, ip } => write!(f, "{network}/{ip}"),
            Self::Hostname { key, .. } => f.write_str(key),
        }
    }
}
