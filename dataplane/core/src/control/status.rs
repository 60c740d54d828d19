//! Our state in the words of proto/control.proto.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::inpod::PodInfo;
use crate::state::TypeState;
use crate::tls::CertStatus;
use crate::wire::control as pb;

pub(super) fn certificate(status: &CertStatus) -> pb::CertificateStatus {
    pb::CertificateStatus {
        identity: status.identity.to_string(),
        not_before: unix_seconds(status.not_before),
        not_after: unix_seconds(status.not_after),
        serial: status.serial.clone(),
        error: status.error.clone(),
    }
}

pub(super) fn type_state(state: TypeState) -> pb::TypeState {
    pb::TypeState {
        type_url: state.type_url,
        processed: state.processed,
        versions: state.versions.into_iter().collect(),
        rejected: state.rejected.into_iter().collect(),
    }
}

pub(super) fn pod(info: &PodInfo) -> pb::Pod {
    pb::Pod {
        uid: info.uid.clone(),
        name: info.name.clone(),
        namespace: info.namespace.clone(),
        service_account: info.service_account.clone(),
    }
}

fn unix_seconds(time: Option<SystemTime>) -> i64 {
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}
