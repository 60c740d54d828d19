//! The writer: turns one delta response into changes of a snapshot, resource by resource.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use prost::{DecodeError, Message};

use super::delta::{Body, Delta, Names, Resource};
use super::intern::Interner;
use super::parse::Bad;
use super::service::ServiceRecord;
use super::snapshot::Snapshot;
use super::store::{Applied, TypeState};
use super::version::Version;
use super::workload::Workload;
use super::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use crate::config::Config;
use crate::policy::{PolicyEdit, Published};
use crate::wire::workload as wds;

#[derive(Default)]
pub struct Writer {
    interner: Interner,
    pub addresses: Book,
    pub policies: Book,
}

/// What isn't kept with the resources themselves.
#[derive(Default)]
pub struct Book {
    processed: bool,
    rejected: BTreeMap<String, String>,
}

impl Writer {
    /// Removals before additions (facts ztunnel 7.5). A resource that is rejected leaves its last
    /// good version in place.
    pub fn apply(
        &mut self,
        snapshot: &mut Snapshot,
        config: &Config,
        response: Bytes,
    ) -> Result<Applied, DecodeError> {
        let delta = Delta::decode(response)?;
        let mut applied = Applied {
            type_url: delta.type_url.clone(),
            nonce: delta.nonce.clone(),
            ..Applied::default()
        };
        match delta.type_url.as_str() {
            ADDRESS_TYPE => self.apply_addresses(snapshot, config, delta, &mut applied),
            AUTHORIZATION_TYPE => self.apply_policies(snapshot, delta, &mut applied),
            unknown => {
                let reason = format!("resource type `{unknown}` is not known to this version");
                applied.rejected.push((unknown.to_owned(), reason));
            }
        }
        Ok(applied)
    }

    fn apply_addresses(
        &mut self,
        snapshot: &mut Snapshot,
        config: &Config,
        delta: Delta,
        applied: &mut Applied,
    ) {
        applied.first = self.addresses.begin();
        if config.on_demand {
            applied.told = told(&delta);
        }
        for name in &delta.removed {
            self.addresses.rejected.remove(name);
            // A service's name may be a uid all the same: uids come first (facts ztunnel 7.5).
            let removed = snapshot.remove_workload(name) || snapshot.remove_service(name);
            applied.removed += u32::from(removed);
        }
        for raw in delta.resources {
            let outcome = open(raw, ADDRESS_TYPE).and_then(|(name, version, value)| {
                self.put_address(snapshot, config, &name, &version, value)
                    .map_err(|reason| (name.clone(), reason))
                    .map(|()| name)
            });
            self.addresses.note(outcome, applied);
        }
    }

    fn put_address(
        &mut self,
        snapshot: &mut Snapshot,
        config: &Config,
        name: &str,
        version: &str,
        value: Bytes,
    ) -> Result<(), String> {
        let text = |bad: Bad| bad.to_string();
        let version = Version::new(version, &mut self.interner);
        let address = wds::Address::decode(value).map_err(|error| error.to_string())?;
        match address.r#type {
            None => Err("it is neither a workload nor a service".to_owned()),
            Some(wds::address::Type::Workload(raw)) => {
                let domain = &config.trust_domain;
                let workload = Workload::parse(&raw, version, domain, &mut self.interner);
                let workload = workload.map_err(text)?;
                same_name(name, &workload.uid)?;
                snapshot.put_workload(Arc::new(workload), &config.node);
                Ok(())
            }
            Some(wds::address::Type::Service(raw)) => {
                let record = ServiceRecord::parse(&raw, version, &mut self.interner);
                let record = record.map_err(text)?;
                same_name(name, &record.key)?;
                snapshot.put_service(Arc::new(record));
                Ok(())
            }
        }
    }

    fn apply_policies(&mut self, snapshot: &mut Snapshot, delta: Delta, applied: &mut Applied) {
        applied.first = self.policies.begin();
        let mut edit = PolicyEdit::new(&snapshot.policies);
        for name in &delta.removed {
            self.policies.rejected.remove(name);
            applied.removed += u32::from(edit.remove(name));
        }
        for raw in delta.resources {
            let outcome = match open(raw, AUTHORIZATION_TYPE) {
                Err((name, reason)) => {
                    edit.put_nothing(&name);
                    Err((name, reason))
                }
                Ok((name, version, value)) => {
                    let (name, version) = (&*name, &*version);
                    edit.put(Published {
                        name,
                        version,
                        value,
                    })
                    .map_err(|bad| (name.to_owned(), bad.to_string()))
                    .map(|()| name.to_owned())
                }
            };
            self.policies.note(outcome, applied);
        }
        snapshot.policies = Arc::new(edit.finish());
    }
}

impl Book {
    pub fn state(
        &self,
        type_url: &str,
        versions: impl Iterator<Item = (String, String)>,
    ) -> TypeState {
        TypeState {
            type_url: type_url.to_owned(),
            processed: self.processed,
            versions: versions.collect(),
            rejected: self.rejected.clone().into_iter().collect(),
        }
    }

    /// Is this the first response of the type?
    fn begin(&mut self) -> bool {
        !std::mem::replace(&mut self.processed, true)
    }

    fn note(&mut self, outcome: Result<String, (String, String)>, applied: &mut Applied) {
        match outcome {
            Ok(name) => {
                self.rejected.remove(&name);
                applied.accepted += 1;
            }
            Err((name, reason)) => {
                self.rejected.insert(name.clone(), reason.clone());
                applied.rejected.push((name, reason));
            }
        }
    }
}

/// What can't be read answers nobody.
fn told(delta: &Delta) -> Vec<String> {
    let sent = delta.resources.iter();
    let sent = sent.filter_map(|raw| Names::decode(raw.clone()).ok());
    let sent = sent.flat_map(|Names { name, aliases }| aliases.into_iter().chain([name]));
    sent.chain(delta.removed.iter().cloned()).collect()
}

/// (name, version, serialised body), or (name, reason).
fn open(raw: Bytes, type_url: &str) -> Result<(String, String, Bytes), (String, String)> {
    let resource = Resource::decode(raw).map_err(|error| (String::new(), error.to_string()))?;
    let Resource {
        version,
        body,
        name,
    } = resource;
    match body {
        Some(Body {
            type_url: own,
            value,
        }) if own == type_url => Ok((name, version, value)),
        Some(body) => Err((
            name,
            format!("its type is `{}`, not `{type_url}`", body.type_url),
        )),
        None => Err((name, "it has no body".to_owned())),
    }
}

/// Versions and removals go by the resource's name, so it must be the record's own.
fn same_name(resource: &str, own: &str) -> Result<(), String> {
    if resource == own {
        Ok(())
    } else {
        Err(format!(
            "the resource is named `{resource}`, but its content `{own}`"
        ))
    }
}
