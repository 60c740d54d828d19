use std::sync::atomic::AtomicBool;

use super::*;

fn take(plane: &Plane) -> Ask {
    Ask::TakeListeners(pb::TakeListeners {
        socket: plane.socket.display().to_string(),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_refused_while_listeners_change_hands() {
    let netns = Arc::new(TestNetns::new());
    let (old, new) = (Plane::start(), Plane::start());
    let mut old_agent = old.agent().await;
    done(old_agent.add("a", &netns).await);
    let stop = Arc::new(AtomicBool::new(false));
    let client = {
        let (netns, stop) = (netns.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut connections = 0;
            while !stop.load(Ordering::Relaxed) {
                for port in [15001, 15006, 15008] {
                    assert!(listens(&netns, &format!("10.99.0.1:{port}")), "refused");
                    connections += 1;
                }
            }
            connections
        })
    };
    let mut new_agent = new.agent().await;
    done(new_agent.ask(add_pod("a", true), vec![netns.fd()]).await);
    assert_eq!(
        new_agent.pods().await[0].state(),
        pb::pod_status::State::Prepared
    );
    done(new_agent.ask(take(&old), vec![]).await);
    assert_eq!(new_agent.pods().await[0].state(), pb::pod_status::State::Up);
    let drain = Ask::Drain(pb::Drain {
        deadline_ms: 500,
        exit: true,
    });
    done(old_agent.ask(drain, vec![]).await);
    timeout(Duration::from_secs(5), old.instance.exit.notified())
        .await
        .expect("the old one is told to end");
    drop(old_agent);
    drop(old);
    // A while with only the new one.
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.store(true, Ordering::Relaxed);
    let connections = client.join().expect("no connection was refused");
    assert!(connections > 10, "{connections}");
    // The old side holds nothing any more: removal frees the ports.
    done(new_agent.ask(remove_pod("a", false), vec![]).await);
    freed(&netns, "10.99.0.1:15001").await;
}

#[tokio::test]
async fn a_pod_that_the_old_one_lacks_gets_listeners_of_its_own() {
    let (a, b) = (TestNetns::new(), TestNetns::new());
    let (old, new) = (Plane::start(), Plane::start());
    done(old.agent().await.add("a", &a).await);
    let mut agent = new.agent().await;
    done(agent.ask(add_pod("a", true), vec![a.fd()]).await);
    done(agent.ask(add_pod("b", true), vec![b.fd()]).await);
    freed(&b, "10.99.0.1:15001").await;
    done(agent.ask(take(&old), vec![]).await);
    assert!(listens(&a, "10.99.0.1:15001"));
    assert!(listens(&b, "10.99.0.1:15001"));
}

#[tokio::test]
async fn a_successor_that_dies_midway_changes_nothing() {
    let netns = TestNetns::new();
    let old = Plane::start();
    let mut agent = old.agent().await;
    done(agent.add("a", &netns).await);
    let mut successor = old.role(Role::Successor).await;
    successor.send(Ask::HandOver(pb::HandOver {}), vec![]).await;
    let (reply, fds) = successor.receive().await.expect("listeners");
    assert!(matches!(reply.body, Some(Body::Listeners(_))) && reply.more);
    assert_eq!(fds.len(), 3);
    drop((successor, fds));
    let up = |pods: Vec<pb::PodStatus>| pods[0].state() == pb::pod_status::State::Up;
    assert!(up(agent.pods().await));
    assert!(listens(&netns, "10.99.0.1:15001"));
    // And removal frees the ports: no duplicate was left behind.
    done(agent.ask(remove_pod("a", false), vec![]).await);
    freed(&netns, "10.99.0.1:15001").await;
}

#[tokio::test]
async fn a_hand_over_that_fails_leaves_the_old_one_accepting() {
    let (a, b) = (TestNetns::new(), TestNetns::new());
    let (old, new) = (Plane::start(), Plane::start());
    let mut old_agent = old.agent().await;
    done(old_agent.add("a", &a).await);
    let mut agent = new.agent().await;
    done(agent.ask(add_pod("a", true), vec![a.fd()]).await);
    done(agent.ask(add_pod("b", true), vec![b.fd()]).await);
    let _taken = b
        .open()
        .enter(|| std::net::TcpListener::bind("0.0.0.0:15006"));
    let (code, _) = error(agent.ask(take(&old), vec![]).await);
    assert_eq!(code, Code::InUse);
    for pod in agent.pods().await {
        assert_eq!(pod.state(), pb::pod_status::State::Prepared);
    }
    assert_eq!(old_agent.pods().await[0].state(), pb::pod_status::State::Up);
    assert!(listens(&a, "10.99.0.1:15001"));
}

#[tokio::test]
async fn an_old_one_that_is_away_or_oneself_is_named() {
    let plane = Plane::start();
    let mut agent = plane.agent().await;
    let nobody = Ask::TakeListeners(pb::TakeListeners {
        socket: "/nonexistent/up-control.sock".into(),
    });
    let (code, text) = error(agent.ask(nobody, vec![]).await);
    assert_eq!(code, Code::NotFound);
    assert!(text.contains("/nonexistent/up-control.sock"), "{text}");
    let (code, text) = error(agent.ask(take(&plane), vec![]).await);
    assert_eq!(code, Code::Invalid);
    assert!(text.contains("own socket"), "{text}");
}

#[tokio::test]
async fn a_successor_may_ask_for_nothing_else() {
    let plane = Plane::start();
    plane.agent().await;
    let mut successor = plane.role(Role::Successor).await;
    let (code, _) = error(successor.ask(remove_pod("a", false), vec![]).await);
    assert_eq!(code, Code::Permission);
}
