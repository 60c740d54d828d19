//! The `baggage` header of HBONE (facts ztunnel 3.3, 3.8): what each end says about its workload.

use http::{HeaderMap, HeaderValue};

use super::authority::LONGEST_NAME;
use crate::state::Workload;
use crate::telemetry::Side;

pub const BAGGAGE: &str = "baggage";

const CLUSTER: &str = "k8s.cluster.name";
const NAMESPACE: &str = "k8s.namespace.name";
const SERVICE: &str = "service.name";
const REVISION: &str = "service.version";
const REGION: &str = "cloud.region";
const ZONE: &str = "cloud.availability_zone";
/// `<type>` in `k8s.<type>.name`.
const TYPES: [&str; 4] = ["deployment", "cronjob", "pod", "job"];

/// Empty members are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    pub cluster: String,
    pub namespace: String,
    pub workload_type: &'static str,
    pub workload: String,
    pub service: String,
    pub revision: String,
    pub region: String,
    pub zone: String,
}

impl Baggage {
    pub fn of(workload: &Workload) -> Self {
        Self {
            cluster: workload.cluster_id.to_string(),
            namespace: workload.namespace.to_string(),
            workload_type: workload.workload_type,
            workload: workload.workload_name.to_string(),
            service: workload.canonical_name.to_string(),
            revision: workload.canonical_revision.to_string(),
            region: workload.locality.region.to_string(),
            zone: workload.locality.zone.to_string(),
        }
    }

    /// Always a header, if an empty one. A member that no header can hold is left out, since there
    /// is no escape for it.
    pub fn to_header(&self) -> HeaderValue {
        let workload_key = format!("k8s.{}.name", self.workload_type);
        let members = [
            (CLUSTER, &self.cluster),
            (NAMESPACE, &self.namespace),
            (workload_key.as_str(), &self.workload),
            (SERVICE, &self.service),
            (REVISION, &self.revision),
            (REGION, &self.region),
            (ZONE, &self.zone),
        ];
        let text: Vec<String> = members
            .into_iter()
            .filter(|(_, value)| !value.is_empty() && fits(value))
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        HeaderValue::from_str(&text.join(",")).unwrap_or(HeaderValue::from_static(""))
    }

    /// Tolerant: unknown keys and broken members are passed over, several headers are one.
    pub fn parse(headers: &HeaderMap) -> Self {
        let mut baggage = Self::default();
        for header in headers.get_all(BAGGAGE) {
            let Ok(text) = header.to_str() else { continue };
            for member in text.split(',') {
                if let Some((key, value)) = member.split_once('=')
                    && value.len() <= LONGEST_NAME
                    // A tab would shift the columns of the log.
                    && fits(value.trim())
                {
                    baggage.set(key.trim(), value.trim());
                }
            }
        }
        baggage
    }

    fn set(&mut self, key: &str, value: &str) {
        let member = match key {
            CLUSTER => &mut self.cluster,
            NAMESPACE => &mut self.namespace,
            SERVICE => &mut self.service,
            REVISION => &mut self.revision,
            REGION => &mut self.region,
            ZONE => &mut self.zone,
            _ => {
                let kind = key
                    .strip_prefix("k8s.")
                    .and_then(|key| key.strip_suffix(".name"));
                let Some(kind) = TYPES.into_iter().find(|known| Some(*known) == kind) else {
                    return;
                };
                self.workload_type = kind;
                &mut self.workload
            }
        };
        value.clone_into(member);
    }

    /// Labels of a peer that is known by its baggage only (facts ztunnel 12.2).
    pub fn to_side(&self) -> Side {
        Side {
            workload: self.workload.as_str().into(),
            canonical_service: self.service.as_str().into(),
            canonical_revision: self.revision.as_str().into(),
            namespace: self.namespace.as_str().into(),
            principal: None,
            app: self.workload.as_str().into(),
            version: self.revision.as_str().into(),
            cluster: self.cluster.as_str().into(),
            region: self.region.as_str().into(),
            zone: self.zone.as_str().into(),
        }
    }
}

fn fits(value: &str) -> bool {
    value
        .chars()
        .all(|c| c.is_ascii_graphic() && c != ',' || c == ' ')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(BAGGAGE, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn prints_members_in_upstreams_order() {
        let baggage = Baggage {
            cluster: "Kubernetes".into(),
            namespace: "shop".into(),
            workload_type: "deployment",
            workload: "web".into(),
            service: "web-svc".into(),
            revision: "v1".into(),
            region: "r".into(),
            zone: "z".into(),
        };
        assert_eq!(
            baggage.to_header(),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,\
             service.name=web-svc,service.version=v1,cloud.region=r,cloud.availability_zone=z"
        );
    }

    #[test]
    fn several_headers_are_one_and_unknown_keys_are_passed_over() {
        let parsed = Baggage::parse(&headers(&[
            "k8s.cluster.name=c, x=y,nonsense,k8s.thing.name=no",
            "k8s.cronjob.name=tick,service.name=a=b",
        ]));
        assert_eq!(parsed.cluster, "c");
        assert_eq!(parsed.workload_type, "cronjob");
        assert_eq!(parsed.workload, "tick");
        assert_eq!(parsed.service, "a=b");
        let long = format!("service.name={}", "a".repeat(254));
        assert_eq!(Baggage::parse(&headers(&[&long])).service, "");
    }

    #[test]
    fn a_member_no_header_can_hold_is_left_out() {
        let baggage = Baggage {
            cluster: "a\nb".into(),
            namespace: "shop".into(),
            ..Default::default()
        };
        assert_eq!(baggage.to_header(), "k8s.namespace.name=shop");
    }

    proptest! {
        #[test]
        fn parses_what_it_prints(
            members in proptest::collection::vec("[a-zA-Z0-9._/-]{0,20}", 7),
            kind in 0..TYPES.len(),
        ) {
            let mut members = members.into_iter();
            let mut next = || members.next().unwrap();
            let mut baggage = Baggage {
                cluster: next(),
                namespace: next(),
                workload_type: TYPES[kind],
                workload: next(),
                service: next(),
                revision: next(),
                region: next(),
                zone: next(),
            };
            let mut headers = HeaderMap::new();
            headers.insert(BAGGAGE, baggage.to_header());
            if baggage.workload.is_empty() {
                baggage.workload_type = "";
            }
            prop_assert_eq!(Baggage::parse(&headers), baggage);
        }

        #[test]
        fn no_header_breaks_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                let mut headers = HeaderMap::new();
                headers.insert(BAGGAGE, value);
                Baggage::parse(&headers);
            }
        }
    }
}
