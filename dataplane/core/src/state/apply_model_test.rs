//! Sequences of pushes against a naive model: maps of what was last said, searched in full.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::fixture::*;
use super::{ADDRESS_TYPE, Store};
use crate::wire::workload as wds;

#[derive(Clone, Debug)]
enum Step {
    Workload(Box<wds::Workload>),
    Service(Box<wds::Service>),
    Remove(String),
    Broken(String),
}

#[derive(Default)]
struct Model {
    workloads: BTreeMap<String, wds::Workload>,
    services: BTreeMap<String, wds::Service>,
    rejected: BTreeMap<String, ()>,
}

impl Model {
    fn apply(&mut self, push: &[Step]) {
        for step in push {
            if let Step::Remove(name) = step {
                self.rejected.remove(name);
                if self.workloads.remove(name).is_none() {
                    self.services.remove(name);
                }
            }
        }
        for step in push {
            match step {
                Step::Workload(w) => {
                    self.rejected.remove(&w.uid);
                    self.workloads.insert(w.uid.clone(), (**w).clone());
                }
                Step::Service(s) => {
                    self.rejected.remove(&key(s));
                    self.services.insert(key(s), (**s).clone());
                }
                Step::Broken(name) => {
                    self.rejected.insert(name.clone(), ());
                }
                Step::Remove(_) => {}
            }
        }
    }

    fn check(&self, store: &Store) -> Result<(), TestCaseError> {
        let snapshot = store.snapshot();
        prop_assert_eq!(
            snapshot.counts(),
            (self.workloads.len(), self.services.len())
        );
        for (uid, raw) in &self.workloads {
            let held = snapshot.workload_by_uid(uid);
            let held = held.ok_or_else(|| TestCaseError::fail(uid.clone()))?;
            prop_assert_eq!(&*held.network, raw.network.as_str());
            prop_assert_eq!(held.services.len(), raw.services.len());
        }
        let local = self.workloads.values().filter(|w| w.node == "node-1");
        prop_assert_eq!(snapshot.local_workloads().count(), local.count());
        for n in 0..ADDRESSES {
            for network in ["net", "far"] {
                let address = address(n);
                let claims = |w: &&wds::Workload| {
                    w.network == network && w.addresses.contains(&ip(&address))
                };
                let model = self.workloads.values().any(|w| claims(&w));
                let ip = address.parse().unwrap();
                let held = snapshot.workload_by_address(network, ip);
                prop_assert_eq!(held.is_some(), model, "{}/{}", network, address);
                if let Some(held) = held {
                    prop_assert!(claims(&&self.workloads[&*held.uid]));
                }
            }
        }
        for name in (0..NAMES).map(|n| key(&service("shop", &format!("s{n}"), "10.1.0.1"))) {
            let members = self
                .workloads
                .values()
                .filter(|w| w.services.contains_key(&name));
            let mut expected: Vec<_> = members.map(|w| w.uid.clone()).collect();
            let held = snapshot.service(&name);
            let mut endpoints: Vec<_> = held
                .iter()
                .flat_map(|s| s.endpoints.iter())
                .map(|w| w.uid.to_string())
                .collect();
            endpoints.sort();
            expected.sort();
            prop_assert_eq!(endpoints, expected);
            let published = held.is_some_and(|s| s.record.is_some());
            prop_assert_eq!(published, self.services.contains_key(&name));
        }
        for n in 0..NAMES as u8 {
            let vip = vip_of(&format!("10.1.0.{n}"));
            let model = self.services.values().any(|s| s.addresses.contains(&vip));
            let ip = [10, 1, 0, n].into();
            let held = snapshot.service_by_vip("net", ip, None);
            prop_assert_eq!(held.is_some(), model);
        }
        let types = store.types();
        let state = types.iter().find(|t| t.type_url == ADDRESS_TYPE).unwrap();
        let mut versions: Vec<_> = state.versions.iter().map(|(name, _)| name).collect();
        versions.sort();
        let mut names: Vec<_> = self.workloads.keys().chain(self.services.keys()).collect();
        names.sort();
        prop_assert_eq!(versions, names);
        let rejected: Vec<_> = state.rejected.iter().map(|(name, _)| name).collect();
        prop_assert_eq!(rejected, self.rejected.keys().collect::<Vec<_>>());
        Ok(())
    }
}

const NAMES: usize = 6;
const ADDRESSES: usize = 8;

fn address(n: usize) -> String {
    format!("10.0.0.{n}")
}

fn step() -> impl Strategy<Value = Step> {
    let few = |range| proptest::collection::vec(range, 0..3);
    let workload = (
        0..NAMES,
        few(0..ADDRESSES),
        few(0..NAMES),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(name, addresses, services, local, near)| {
            let mut w = pod("shop", &format!("w{name}"), "10.0.0.1");
            w.addresses = addresses.into_iter().map(|n| ip(&address(n))).collect();
            w.node = if local { "node-1" } else { "node-2" }.into();
            w.network = if near { "net" } else { "far" }.into();
            for n in services {
                w = member(w, &service("shop", &format!("s{n}"), "10.1.0.1"), &[]);
            }
            w
        });
    let service = (0..NAMES, 0..NAMES)
        .prop_map(|(name, vip)| service("shop", &format!("s{name}"), &format!("10.1.0.{vip}")));
    let name = prop_oneof![
        workload.clone().prop_map(|w| w.uid),
        service.clone().prop_map(|s| key(&s)),
    ]
    .boxed();
    prop_oneof![
        4 => workload.prop_map(|w| Step::Workload(Box::new(w))),
        2 => service.prop_map(|s| Step::Service(Box::new(s))),
        3 => name.clone().prop_map(Step::Remove),
        1 => name.prop_map(Step::Broken),
    ]
}

proptest! {
    #[test]
    fn any_sequence_of_pushes_leaves_what_was_last_said(
        pushes in proptest::collection::vec(proptest::collection::vec(step(), 0..8), 1..20),
    ) {
        let store = store();
        let mut model = Model::default();
        for steps in pushes {
            let push = steps.iter().fold(Push::addresses(), |push, step| match step {
                Step::Workload(w) => push.workload((**w).clone()),
                Step::Service(s) => push.service((**s).clone()),
                Step::Remove(name) => push.removed(name),
                Step::Broken(name) => push.bytes(name, "2", vec![0xff]),
            });
            push.to(&store);
            model.apply(&steps);
            model.check(&store)?;
        }
    }
}
