//! The node's address at declared probe ports, under STRICT, with real connections. web has the
//! address of db's node.

use super::testing::{Settings, World, deny, exchange};
use crate::state::fixture::Push;
use crate::wire::control as pb;

const PORT: u16 = 8080;
const ALLOWED: [&str; 2] = ["policy=\"kubelet_probe\"", "verdict=\"allow\""];

/// db serves two ports and listens to none but the mesh.
fn strict(kubelet_probe_fallback: bool) -> World {
    let config = pb::InstanceConfig {
        kubelet_probe_fallback,
        ..Default::default()
    };
    let world = World::with(&Settings {
        config,
        ..Default::default()
    });
    let mut strict = deny("strict", "nobody");
    let matches = &mut strict.rules[0].clauses[0].matches[0];
    matches.not_principals = std::mem::take(&mut matches.principals);
    Push::policies()
        .policy(strict)
        .accepted_by(&world.db.shared.store);
    world
}

/// In plain text, as from outside the mesh.
async fn reaches(world: &World, dst: &str) -> bool {
    let (web, dst) = (&world.web, dst.parse().unwrap());
    let stream = web.netns.connect(&web.shared.config, dst, None).await;
    exchange(stream.unwrap(), b"probe").await.is_ok()
}

#[tokio::test]
async fn the_nodes_address_reaches_a_declared_port_alone() {
    let mut world = strict(true);
    let peers = world.db.echo("[::]:8080");
    let _other = world.db.echo("[::]:8081");
    world.db.proxy.probed_at(vec![PORT]);
    assert!(reaches(&world, "10.77.0.2:8080").await);
    let seen = peers.lock().unwrap()[0].ip().to_canonical();
    assert_eq!(seen.to_string(), "10.77.0.1");
    let line = world.logged(&["policy=\"kubelet_probe\""]).await;
    assert!(line.contains("src.addr=10.77.0.1"), "{line}");
    assert_eq!(
        world.db.metric("underpass_policy_verdicts_total", &ALLOWED),
        1
    );
    assert!(!reaches(&world, "10.77.0.2:8081").await);
    // An address that the node hasn't.
    assert!(!reaches(&world, "[fd77::2]:8080").await);
    world.db.proxy.probed_at(Vec::new());
    assert!(!reaches(&world, "10.77.0.2:8080").await);
    assert_eq!(
        world.db.metric("underpass_policy_verdicts_total", &ALLOWED),
        1
    );
}

#[tokio::test]
async fn unasked_for_the_nodes_address_is_nothing() {
    let world = strict(false);
    let _peers = world.db.echo("[::]:8080");
    world.db.proxy.probed_at(vec![PORT]);
    assert!(!reaches(&world, "10.77.0.2:8080").await);
}
