//! What a namespace demands beyond policies, with real connections.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::{Side, World, eventually, exchange, record, soon};
use super::{Demands, Enforcement};
use crate::state::fixture::{Push, gateway_at};
use crate::wire::workload as wds;

fn registry_only(demand: Enforcement) -> Demands {
    Demands {
        registry_only: demand,
        ..Demands::default()
    }
}

fn waypoint_required(demand: Enforcement) -> Demands {
    Demands {
        waypoint_required: demand,
        ..Demands::default()
    }
}

async fn reaches(from: &Side, dst: &str) -> bool {
    match from.dial(dst).await {
        Ok(stream) => exchange(stream, b"x").await.is_ok_and(|got| got == b"x"),
        Err(_) => false,
    }
}

#[tokio::test]
async fn an_unknown_destination_is_refused_only_where_the_registry_is_all() {
    let mut world = World::new();
    world.db.ip("addr add 10.77.0.50/24 dev eth0");
    let _peers = world.db.echo("0.0.0.0:8080");
    let (unknown, known) = ("10.77.0.50:8080", "10.77.0.2:8080");
    let count = |world: &World, outcome: &str| {
        let label = format!("outcome=\"{outcome}\"");
        let name = "underpass_registry_only_total";
        world.web.metric(name, &[&label])
    };
    assert!(reaches(&world.web, unknown).await);

    world.web.proxy.demand(registry_only(Enforcement::DryRun));
    assert!(reaches(&world.web, unknown).await, "only tried out");
    assert_eq!(count(&world, "would_refuse"), 1);
    let tried = ["dry run", "registryOnly", "would refuse", unknown];
    world.logged(&tried).await;

    world.web.proxy.demand(registry_only(Enforcement::On));
    assert!(!reaches(&world.web, unknown).await);
    assert!(reaches(&world.web, known).await, "others are as before");
    assert_eq!(count(&world, "refused"), 1);
    assert_eq!(count(&world, "would_refuse"), 1);
    let refused = world.web.metric(
        "underpass_refusals_total",
        &["reason=\"registry_only\"", "direction=\"outbound\""],
    );
    assert_eq!(refused, 1);
    let line = [
        "connection failed",
        unknown,
        "namespace shop",
        "ServiceEntry",
    ];
    world.logged(&line).await;

    world.web.proxy.demand(Demands::default());
    assert!(reaches(&world.web, unknown).await);
}

/// The record of `db` with a waypoint at this address.
fn behind(waypoint: &str) -> wds::Workload {
    let mut db = record("db");
    db.waypoint = Some(gateway_at(waypoint, 15008));
    db
}

#[tokio::test]
async fn what_did_not_come_through_the_waypoint_is_refused() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let dst = "10.77.0.2:8080";
    let count = |world: &World, outcome: &str| {
        let label = format!("outcome=\"{outcome}\"");
        let name = "underpass_waypoint_required_total";
        world.db.metric(name, &[&label])
    };
    let tell_db = |world: &World, record| {
        Push::addresses()
            .workload(record)
            .accepted_by(&world.db.shared.store);
    };

    // The client is the waypoint.
    tell_db(&world, behind("10.77.0.1"));
    world.db.proxy.demand(waypoint_required(Enforcement::On));
    assert!(reaches(&world.web, dst).await);

    // It is somebody else.
    tell_db(&world, behind("10.77.0.99"));
    world
        .db
        .proxy
        .demand(waypoint_required(Enforcement::DryRun));
    assert!(reaches(&world.web, dst).await, "only tried out");
    assert_eq!(count(&world, "would_refuse"), 1);
    let mut live = world.web.dial(dst).await.unwrap();
    live.write_all(b"ping").await.unwrap();
    soon(live.read_exact(&mut [0; 4])).await.unwrap();

    world.db.proxy.demand(waypoint_required(Enforcement::On));
    let ended = soon(live.read(&mut [0; 1])).await;
    assert!(!matches!(ended, Ok(1..)), "a live connection is cut");
    assert!(!reaches(&world.web, dst).await);
    eventually("both are counted", || count(&world, "refused") == 2).await;
    let denied = ["connection complete", "waypoint required", "net/10.77.0.99"];
    world.logged(&denied).await;
    let denials = world.db.metric(
        "istio_tcp_connections_closed_total",
        &["reporter=\"destination\"", "response_flags=\"DENY\""],
    );
    assert_eq!(denials, 2);

    // Without a waypoint nothing can have come through one.
    tell_db(&world, record("db"));
    assert!(!reaches(&world.web, dst).await);
    world.logged(&["connection complete", "no waypoint"]).await;
    world.db.proxy.demand(Demands::default());
    assert!(reaches(&world.web, dst).await);
}
