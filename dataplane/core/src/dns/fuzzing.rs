//! What pods and nameservers send, for the fuzz targets.

use std::net::Ipv4Addr;

use super::answer::{self, Answer};
use super::names::Scope;
use super::wire::{self, Query, Unusable};

/// Takes a pod's packet the whole way, with `said` as the nameserver's answer to it. Returns what
/// the pod would get, in the order: refused or failed, from the mesh, relayed, relayed shortened,
/// from the cache.
pub fn ask(packet: &[u8], said: &[u8]) -> Vec<Vec<u8>> {
    let query = match Query::parse(packet) {
        Ok(query) => query,
        Err(Unusable::Drop) => return Vec::new(),
        Err(Unusable::Refuse(code)) => return vec![answer::refusal(packet, code)],
    };
    let scope = Scope {
        namespace: "shop",
        cluster_domain: "cluster.local",
        search: None,
    };
    let asked = query.name.to_string().to_ascii_lowercase();
    scope.candidates(asked.trim_end_matches('.'));
    let failed = answer::failure(&query, hickory_proto::op::ResponseCode::ServFail);
    let mut own = Answer::new(&query);
    own.alias("web.shop.svc.cluster.local");
    own.addresses(&[Ipv4Addr::LOCALHOST.into(); 60]);
    let mut answers = vec![failed, own.encode(query.payload())];
    if wire::answers(packet, &query, said) {
        answers.push(said.to_vec());
        answers.push(wire::truncated(said, &query));
        if let (Some(life), Some(_)) = (wire::lifetime(said, &query), query.key(packet)) {
            answers.push(wire::renewed(said, &life.ttls, 1, packet, &query));
        }
    }
    answers
}

/// How many bytes the packet's sender takes over UDP.
pub fn room(packet: &[u8]) -> usize {
    Query::parse(packet).map_or(512, |query| query.payload())
}
