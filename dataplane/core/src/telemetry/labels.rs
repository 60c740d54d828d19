//! The label sets of traffic metrics (facts ztunnel 12.2), shared by all connections that have the
//! same one.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelSetEncoder};

use crate::identity::Identity;
use crate::state::{ServiceName, Workload};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    Source,
    Destination,
}

/// Why a connection failed, as dashboards know it. The numbers index counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Flags {
    None = 0,
    Deny,
    Connect,
    TlsFailure,
    H2HandshakeFailure,
    NetworkPolicy,
    IdentityError,
    CertRevoked,
    /// Ours: bytes could be relayed, then the connection broke; upstream shows it as `CONNECT`.
    MidStream,
}

/// One end of a connection. Empty texts are shown as `unknown`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Side {
    pub workload: Arc<str>,
    pub canonical_service: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub namespace: Arc<str>,
    /// Source: only what mTLS proved. Destination: what the control plane says, even for plaintext.
    pub principal: Option<Identity>,
    pub app: Arc<str>,
    pub version: Arc<str>,
    pub cluster: Arc<str>,
    pub region: Arc<str>,
    pub zone: Arc<str>,
}

/// All labels of one time series, without the flags: these are known only at the end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Labels {
    pub reporter: Reporter,
    pub source: Side,
    pub destination: Side,
    pub service: Option<ServiceName>,
    pub mtls: bool,
}

/// Labels together with flags, in the order that upstream prints.
#[derive(Clone, Copy, Debug)]
pub(super) struct WithFlags<'a>(pub &'a Labels, pub Flags);

impl Reporter {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl Flags {
    pub const ALL: [Self; 9] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
        Self::CertRevoked,
        Self::MidStream,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
            Self::MidStream => "MID_STREAM",
        }
    }
}

impl Side {
    /// `principal` is given apart, since for a source it must come from the certificate.
    pub fn of(workload: &Workload, principal: Option<Identity>) -> Self {
        Self {
            workload: workload.workload_name.clone(),
            canonical_service: workload.canonical_name.clone(),
            canonical_revision: workload.canonical_revision.clone(),
            namespace: workload.namespace.clone(),
            principal,
            app: workload.canonical_name.clone(),
            version: workload.canonical_revision.clone(),
            cluster: workload.cluster_id.clone(),
            region: workload.locality.region.clone(),
            zone: workload.locality.zone.clone(),
        }
    }

    fn has_locality(&self) -> bool {
        !self.region.is_empty() || !self.zone.is_empty()
    }
}

impl EncodeLabelSet for WithFlags<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        let Self(labels, flags) = self;
        let (source, destination) = (&labels.source, &labels.destination);
        let mut label = |key: &str, value: &str| text(encoder, key, value);
        label("reporter", labels.reporter.as_str())?;
        label("source_workload", &source.workload)?;
        label("source_canonical_service", &source.canonical_service)?;
        label("source_canonical_revision", &source.canonical_revision)?;
        label("source_workload_namespace", &source.namespace)?;
        principal(encoder, "source_principal", source.principal.as_ref())?;
        let mut label = |key: &str, value: &str| text(encoder, key, value);
        label("source_app", &source.app)?;
        label("source_version", &source.version)?;
        label("source_cluster", &source.cluster)?;
        let service = labels.service.as_ref();
        label(
            "destination_service",
            service.map_or("", |s| s.hostname.as_ref()),
        )?;
        label(
            "destination_service_namespace",
            service.map_or("", |s| s.namespace.as_ref()),
        )?;
        label(
            "destination_service_name",
            service.map_or("", |s| s.name.as_ref()),
        )?;
        label("destination_workload", &destination.workload)?;
        label(
            "destination_canonical_service",
            &destination.canonical_service,
        )?;
        label(
            "destination_canonical_revision",
            &destination.canonical_revision,
        )?;
        label("destination_workload_namespace", &destination.namespace)?;
        principal(
            encoder,
            "destination_principal",
            destination.principal.as_ref(),
        )?;
        let mut label = |key: &str, value: &str| text(encoder, key, value);
        label("destination_app", &destination.app)?;
        label("destination_version", &destination.version)?;
        label("destination_cluster", &destination.cluster)?;
        label("request_protocol", "tcp")?;
        label("response_flags", flags.as_str())?;
        label(
            "connection_security_policy",
            if labels.mtls { "mutual_tls" } else { "" },
        )?;
        if source.has_locality() || destination.has_locality() {
            label("source_region", &source.region)?;
            label("source_zone", &source.zone)?;
            label("destination_region", &destination.region)?;
            label("destination_zone", &destination.zone)?;
        }
        Ok(())
    }
}

pub(super) fn text(
    encoder: &mut LabelSetEncoder,
    key: &str,
    value: &str,
) -> Result<(), fmt::Error> {
    let mut label = encoder.encode_label();
    let mut name = label.encode_label_key()?;
    name.write_str(key)?;
    let mut content = name.encode_label_value()?;
    let value = if value.is_empty() { "unknown" } else { value };
    EncodeLabelValue::encode(&value, &mut content)?;
    content.finish()
}

pub(super) fn principal(
    encoder: &mut LabelSetEncoder,
    key: &str,
    identity: Option<&Identity>,
) -> Result<(), fmt::Error> {
    match identity {
        Some(identity) => text(encoder, key, &identity.to_string()),
        None => text(encoder, key, ""),
    }
}
