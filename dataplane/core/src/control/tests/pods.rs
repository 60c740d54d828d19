use super::*;

const PORTS: [u16; 3] = [15001, 15006, 15008];

#[tokio::test]
async fn an_added_pod_listens_on_three_ports_of_both_families() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.add("a", &netns).await);
    for port in PORTS {
        assert!(listens(&netns, &format!("10.99.0.1:{port}")));
        assert!(listens(&netns, &format!("[fd99::1]:{port}")));
    }
    let pods = agent.pods().await;
    assert_eq!(pods[0].state(), pb::pod_status::State::Up);
    assert_eq!((pods[0].netns_inode, pods[0].netns_dev), netns.open().id());
    assert_eq!(pods[0].pod.as_ref().unwrap().name, "name-a");
    // The same again.
    done(agent.add("a", &netns).await);
    assert_eq!(agent.pods().await.len(), 1);
}

#[tokio::test]
async fn a_removed_pod_frees_its_ports() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    for drain in [false, true] {
        done(agent.add("a", &netns).await);
        done(agent.ask(remove_pod("a", drain), vec![]).await);
        for port in PORTS {
            freed(&netns, &format!("10.99.0.1:{port}")).await;
        }
        if drain {
            let drained = pb::event::Event::PodDrained(pb::PodDrained { uid: "a".into() });
            assert_eq!(agent.event().await, drained);
        }
        assert!(agent.pods().await.is_empty());
    }
    done(agent.ask(remove_pod("never heard of", false), vec![]).await);
}

#[tokio::test]
async fn a_descriptor_of_something_else_is_invalid() {
    let plane = Plane::start();
    let mut agent = plane.agent().await;
    let file = std::fs::File::open("/proc/version").unwrap();
    let (code, text) = error(agent.ask(add_pod("a", false), vec![file.into()]).await);
    assert_eq!(code, Code::Invalid);
    assert!(text.contains("shop/name-a"), "{text}");
    assert!(text.contains("no network namespace"), "{text}");
}

#[tokio::test]
async fn a_pod_with_an_empty_field_is_invalid() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    let nameless = Ask::AddPod(pb::AddPod {
        pod: Some(pb::Pod {
            uid: "a".into(),
            ..Default::default()
        }),
        ..Default::default()
    });
    let (code, text) = error(agent.ask(nameless, vec![netns.fd()]).await);
    assert_eq!((code, text.as_str()), (Code::Invalid, "pod.name is empty"));
}

#[tokio::test]
async fn a_taken_port_is_in_use_until_it_is_free() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let other = netns
        .open()
        .enter(|| std::net::TcpListener::bind("0.0.0.0:15008"));
    let mut agent = plane.agent().await;
    let (code, text) = error(agent.add("a", &netns).await);
    assert_eq!(code, Code::InUse);
    assert!(
        text.contains("15008") && text.contains("shop/name-a"),
        "{text}"
    );
    assert!(agent.pods().await.is_empty());
    drop(other);
    freed(&netns, "10.99.0.1:15008").await;
    done(agent.add("a", &netns).await);
}

#[tokio::test]
async fn two_pods_cannot_share_a_namespace() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.add("a", &netns).await);
    let (code, text) = error(agent.add("b", &netns).await);
    assert_eq!(code, Code::InUse);
    assert!(text.contains("shop/name-a"), "{text}");
}

#[tokio::test]
async fn the_same_uid_in_another_namespace_replaces_the_pod() {
    let plane = Plane::start();
    let (old, new) = (TestNetns::new(), TestNetns::new());
    let mut agent = plane.agent().await;
    done(agent.add("a", &old).await);
    done(agent.add("a", &new).await);
    freed(&old, "10.99.0.1:15001").await;
    assert!(listens(&new, "10.99.0.1:15001"));
    assert_eq!(agent.pods().await.len(), 1);
}

#[tokio::test]
async fn keep_pods_removes_the_others() {
    let plane = Plane::start();
    let (a, b) = (TestNetns::new(), TestNetns::new());
    let mut agent = plane.agent().await;
    done(agent.add("a", &a).await);
    done(agent.add("b", &b).await);
    let keep = Ask::KeepPods(pb::KeepPods {
        uids: vec!["b".into(), "unknown".into()],
    });
    done(agent.ask(keep, vec![]).await);
    freed(&a, "10.99.0.1:15001").await;
    assert!(listens(&b, "10.99.0.1:15001"));
    done(agent.ask(Ask::PodsSynced(pb::PodsSynced {}), vec![]).await);
}

#[tokio::test]
async fn update_changes_settings_of_known_pods_only() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.add("a", &netns).await);
    let update = |uid: &str| {
        Ask::UpdatePod(pb::UpdatePod {
            uid: uid.into(),
            settings: Some(pb::PodSettings {
                addresses: vec!["10.0.0.9".into()],
                ..Default::default()
            }),
        })
    };
    done(agent.ask(update("a"), vec![]).await);
    let pods = agent.pods().await;
    assert_eq!(pods[0].settings.as_ref().unwrap().addresses, ["10.0.0.9"]);
    assert_eq!(
        error(agent.ask(update("b"), vec![]).await).0,
        Code::NotFound
    );
}

#[tokio::test]
async fn listeners_outlive_the_agent() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.add("a", &netns).await);
    drop(agent);
    let mut observer = plane.role(Role::Observer).await;
    assert_eq!(observer.pods().await.len(), 1);
    assert!(listens(&netns, "10.99.0.1:15001"));
    // And the next agent finds them.
    let mut client = Client::connect(&plane).await;
    let Body::Hello(hello) = client.hello(Role::Agent).await else {
        panic!("no HelloReply");
    };
    assert_eq!(hello.pods.len(), 1);
}

#[tokio::test]
async fn a_drained_data_plane_takes_no_pods() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.add("a", &netns).await);
    let drain = Ask::Drain(pb::Drain {
        deadline_ms: 500,
        exit: false,
    });
    done(agent.ask(drain, vec![]).await);
    freed(&netns, "10.99.0.1:15001").await;
    assert!(agent.pods().await.is_empty());
    assert_eq!(error(agent.add("a", &netns).await).0, Code::Draining);
    let mut observer = Client::connect(&plane).await;
    let Body::Hello(hello) = observer.hello(Role::Observer).await else {
        panic!("no HelloReply");
    };
    assert!(hello.draining);
}
