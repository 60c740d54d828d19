use tokio::io::AsyncWriteExt;

use super::*;

#[tokio::test]
async fn hello_tells_who_answers() {
    let plane = Plane::start();
    let mut client = Client::connect(&plane).await;
    let Body::Hello(hello) = client.hello(Role::Agent).await else {
        panic!("no HelloReply");
    };
    assert_eq!(hello.version, 1);
    assert_eq!(hello.pid, std::process::id());
    assert_eq!(hello.instance_id, plane.instance.id);
    assert_eq!(hello.config.unwrap().node, "up-control-node");
    assert!(!hello.draining && !hello.synced);
}

#[tokio::test]
async fn another_version_is_refused_with_both_numbers() {
    let plane = Plane::start();
    let mut client = Client::connect(&plane).await;
    let hello = pb::Hello {
        version: 7,
        ..Default::default()
    };
    let (code, text) = error(client.ask(Ask::Hello(hello), vec![]).await);
    assert_eq!(code, Code::Version);
    assert!(text.contains('7') && text.contains('1'), "{text}");
    assert!(client.receive().await.is_none());
}

#[tokio::test]
async fn nothing_is_answered_before_hello() {
    let plane = Plane::start();
    let mut client = Client::connect(&plane).await;
    let (code, _) = error(client.ask(Ask::ListPods(pb::ListPods {}), vec![]).await);
    assert_eq!(code, Code::Invalid);
    assert!(client.receive().await.is_none());
}

#[tokio::test]
async fn an_agent_without_a_node_is_refused_and_the_next_one_served() {
    let plane = Plane::start();
    let mut client = Client::connect(&plane).await;
    let hello = pb::Hello {
        version: 1,
        ..Default::default()
    };
    let (code, text) = error(client.ask(Ask::Hello(hello), vec![]).await);
    assert_eq!(code, Code::Invalid);
    assert!(text.contains("node"), "{text}");
    plane.agent().await;
}

#[tokio::test]
async fn an_agent_of_another_node_is_refused() {
    let plane = Plane::start();
    drop(plane.agent().await);
    let mut client = Client::connect(&plane).await;
    let hello = pb::Hello {
        version: 1,
        config: Some(pb::InstanceConfig {
            node: "elsewhere".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let (code, text) = error(client.ask(Ask::Hello(hello), vec![]).await);
    assert_eq!(code, Code::Invalid);
    assert!(text.contains("config.node"), "{text}");
    assert!(text.contains("elsewhere"), "{text}");
}

#[tokio::test]
async fn a_second_agent_is_refused_while_the_first_lives() {
    let plane = Plane::start();
    let mut first = plane.agent().await;
    let mut second = Client::connect(&plane).await;
    let (code, text) = error(second.hello(Role::Agent).await);
    assert_eq!(code, Code::InUse);
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    assert!(first.pods().await.is_empty());
    drop(first);
    plane.agent().await;
}

#[tokio::test]
async fn an_agent_that_starts_before_its_predecessors_end_was_noticed_is_served() {
    let plane = Plane::start();
    let first = plane.agent().await;
    let mut second = Client::connect(&plane).await;
    let (answer, ()) = tokio::join!(second.hello(Role::Agent), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(first);
    });
    assert!(matches!(answer, Body::Hello(_)), "{answer:?}");
}

#[tokio::test]
async fn an_observer_reads_and_changes_nothing() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.add("a", &netns).await);
    let mut observer = plane.role(Role::Observer).await;
    assert_eq!(observer.pods().await.len(), 1);
    let metrics = observer.ask(Ask::GetMetrics(pb::GetMetrics {}), vec![]);
    let Body::Chunk(last) = metrics.await else {
        panic!("no metrics");
    };
    assert!(last.data.ends_with(b"# EOF\n"));
    for ask in [
        remove_pod("a", false),
        Ask::KeepPods(pb::KeepPods::default()),
        Ask::Drain(pb::Drain::default()),
        Ask::HandOver(pb::HandOver {}),
        Ask::NewCsr(pb::NewCsr::default()),
    ] {
        let (code, text) = error(observer.ask(ask, vec![]).await);
        assert_eq!(code, Code::Permission);
        assert!(text.contains("OBSERVER"), "{text}");
    }
    let fd = vec![netns.fd()];
    let (code, _) = error(observer.ask(add_pod("b", false), fd).await);
    assert_eq!(code, Code::Permission);
    assert_eq!(agent.pods().await.len(), 1);
}

#[tokio::test]
async fn a_broken_frame_ends_only_its_connection() {
    let plane = Plane::start();
    let mut agent = plane.agent().await;
    for broken in [&b"\xff\xff\xff\xffxx"[..], b"\0\0\0\x02\xff\xff"] {
        let mut other = plane.role(Role::Observer).await;
        other.stream.write_all(broken).await.unwrap();
        assert!(other.receive().await.is_none());
    }
    assert!(agent.pods().await.is_empty());
}

#[tokio::test]
async fn an_unknown_request_is_answered() {
    let plane = Plane::start();
    let mut agent = plane.agent().await;
    let request = pb::Request {
        id: 99,
        fds: 0,
        body: None,
    };
    frame::write(&agent.stream, &request, &[]).await.unwrap();
    let (reply, _) = agent.receive().await.expect("an answer");
    assert_eq!(reply.id, 99);
    assert_eq!(error(reply.body.unwrap()).0, Code::Invalid);
}

#[tokio::test]
async fn missing_and_surplus_descriptors_are_invalid_and_the_connection_goes_on() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    for fds in [vec![], vec![netns.fd(), netns.fd()]] {
        let (code, text) = error(agent.ask(add_pod("a", false), fds).await);
        assert_eq!(code, Code::Invalid);
        assert!(text.contains("descriptors"), "{text}");
    }
    let surplus = agent.ask(Ask::ListPods(pb::ListPods {}), vec![netns.fd()]);
    assert_eq!(error(surplus.await).0, Code::Invalid);
    assert!(agent.pods().await.is_empty());
}

#[tokio::test]
async fn an_observer_that_reads_nothing_blocks_nobody() {
    let plane = Plane::start();
    let mut agent = plane.agent().await;
    let mut stuck = plane.role(Role::Observer).await;
    // More answers than the socket and the queue hold.
    for _ in 0..300 {
        let send = stuck.send(Ask::GetMetrics(pb::GetMetrics {}), vec![]);
        if timeout(Duration::from_millis(200), send).await.is_err() {
            break;
        }
    }
    let mut other = plane.role(Role::Observer).await;
    assert!(other.pods().await.is_empty());
    assert!(agent.pods().await.is_empty());
}

#[tokio::test]
async fn configure_refuses_a_bad_filter_by_name() {
    let plane = Plane::start();
    let mut agent = plane.agent().await;
    let configure = |filter: &str| {
        Ask::Configure(pb::Configure {
            log: Some(pb::LogConfig {
                filter: filter.into(),
                ..Default::default()
            }),
            limits: Some(pb::Limits {
                drain_deadline_ms: 77,
                ..Default::default()
            }),
        })
    };
    let deadline = || {
        let node = plane.instance.node().expect("configured");
        node.shared.limits.load().drain_deadline
    };
    let (code, _) = error(agent.ask(configure("=nonsense=="), vec![]).await);
    assert_eq!(code, Code::Invalid);
    assert_eq!(deadline(), Duration::from_secs(5));
    done(agent.ask(configure("debug"), vec![]).await);
    assert_eq!(deadline(), Duration::from_millis(77));
    // A later agent, or an observer, is told of what changed.
    let hello = plane.instance.hello().await.config.expect("configured");
    assert_eq!(hello.log.expect("set").filter, "debug");
    assert_eq!(hello.limits.expect("set").drain_deadline_ms, 77);
}

#[tokio::test]
async fn dumps_have_sections_and_unknown_ones_are_not_found() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.add("a", &netns).await);
    let dump = |section: &str| {
        Ask::Dump(pb::Dump {
            section: section.into(),
        })
    };
    for section in ["workloads", "services", "policies", "certificates"] {
        let Body::Chunk(chunk) = agent.ask(dump(section), vec![]).await else {
            panic!("{section}");
        };
        let json: serde_json::Value = serde_json::from_slice(&chunk.data).expect(section);
        assert!(json.is_array(), "{section}: {json}");
    }
    let Body::Chunk(chunk) = agent.ask(dump("workloadState"), vec![]).await else {
        panic!("no workloadState");
    };
    let json: serde_json::Value = serde_json::from_slice(&chunk.data).unwrap();
    assert_eq!(json["a"]["state"], "Up");
    assert_eq!(json["a"]["info"]["serviceAccount"], "web");
    assert_eq!(
        error(agent.ask(dump("nope"), vec![]).await).0,
        Code::NotFound
    );
}

/// On demand.
#[tokio::test]
async fn a_name_is_wanted_once_and_again_by_a_new_agent() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let hello = || {
        Ask::Hello(pb::Hello {
            role: Role::Agent.into(),
            version: 1,
            config: Some(pb::InstanceConfig {
                node: "up-control-node".into(),
                on_demand: true,
                ..Default::default()
            }),
        })
    };
    let wanted = pb::event::Event::ResourceWanted(pb::ResourceWanted {
        type_url: crate::state::ADDRESS_TYPE.into(),
        name: "Kubernetes//Pod/shop/name-a".into(),
    });
    let mut first = Client::connect(&plane).await;
    assert!(matches!(first.ask(hello(), vec![]).await, Body::Hello(_)));
    done(first.add("a", &netns).await);
    assert_eq!(first.event().await, wanted);
    drop(first);
    let mut second = Client::connect(&plane).await;
    assert!(matches!(second.ask(hello(), vec![]).await, Body::Hello(_)));
    assert_eq!(second.event().await, wanted);
}
