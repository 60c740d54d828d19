//! DNS of a pod: with it, by an update, and in a hand-over.

use std::net::UdpSocket;

use super::*;

/// A query without a question, which is answered at once whoever asks.
const PING: &[u8] = b"\x00\x07\x00\x00\x00\x00\0\0\0\0\0\0";

fn settings(dns: bool) -> pb::PodSettings {
    pb::PodSettings {
        dns,
        ..Default::default()
    }
}

fn add(prepare_only: bool) -> Ask {
    let Ask::AddPod(mut add) = add_pod("a", prepare_only) else {
        unreachable!("add_pod makes an AddPod");
    };
    add.settings = Some(settings(true));
    Ask::AddPod(add)
}

fn update(settings: pb::PodSettings) -> Ask {
    Ask::UpdatePod(pb::UpdatePod {
        uid: "a".into(),
        settings: Some(settings),
    })
}

fn answers(netns: &TestNetns) -> bool {
    let ask = || {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect("127.0.0.1:15053")?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(socket)
    };
    let asked: std::io::Result<UdpSocket> = netns.open().enter(ask).unwrap();
    let socket = asked.unwrap();
    let sent = socket.send(PING);
    sent.is_ok() && socket.recv(&mut [0; 64]).is_ok()
}

/// Until nobody holds the socket any more: then ICMP says so.
async fn unanswered(netns: &TestNetns) {
    let wait = async {
        while answers(netns) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let gone = timeout(Duration::from_secs(10), wait).await;
    assert!(gone.is_ok(), "DNS is still answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_turns_dns_off_and_on() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.ask(add(false), vec![netns.fd()]).await);
    assert!(answers(&netns));
    assert!(listens(&netns, "127.0.0.1:15053"));
    done(agent.ask(update(settings(false)), vec![]).await);
    unanswered(&netns).await;
    freed(&netns, "127.0.0.1:15053").await;
    assert!(listens(&netns, "10.99.0.1:15001"));
    done(agent.ask(update(settings(true)), vec![]).await);
    assert!(answers(&netns));
    done(agent.ask(remove_pod("a", false), vec![]).await);
    unanswered(&netns).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_resolv_conf_and_a_taken_port_change_nothing() {
    let plane = Plane::start();
    let netns = TestNetns::new();
    let mut agent = plane.agent().await;
    done(agent.add("a", &netns).await);
    let held = netns.open().enter(|| UdpSocket::bind("127.0.0.1:15053"));
    let (code, text) = error(agent.ask(update(settings(true)), vec![]).await);
    assert_eq!(code, Code::InUse);
    assert!(
        text.contains("15053") && text.contains("shop/name-a"),
        "{text}"
    );
    drop(held);
    let bad = pb::PodSettings {
        resolv_conf: Some(pb::ResolvConf {
            nameservers: vec!["dns.example".into()],
            ..Default::default()
        }),
        ..settings(true)
    };
    let (code, text) = error(agent.ask(update(bad), vec![]).await);
    assert_eq!(code, Code::Invalid);
    assert!(text.contains("resolv_conf.nameservers"), "{text}");
    assert!(!agent.pods().await[0].settings.as_ref().unwrap().dns);
    done(agent.ask(update(settings(true)), vec![]).await);
    assert!(answers(&netns));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_question_is_lost_while_its_sockets_change_hands() {
    let netns = Arc::new(TestNetns::new());
    let (old, new) = (Plane::start(), Plane::start());
    let mut old_agent = old.agent().await;
    done(old_agent.ask(add(false), vec![netns.fd()]).await);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let client = {
        let (netns, stop) = (netns.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                assert!(answers(&netns), "unanswered after {asked}");
                assert!(listens(&netns, "127.0.0.1:15053"), "refused");
                asked += 1;
            }
            asked
        })
    };
    let mut agent = new.agent().await;
    done(agent.ask(add(true), vec![netns.fd()]).await);
    let take = Ask::TakeListeners(pb::TakeListeners {
        socket: old.socket.display().to_string(),
    });
    done(agent.ask(take, vec![]).await);
    let drain = Ask::Drain(pb::Drain {
        deadline_ms: 500,
        exit: true,
    });
    done(old_agent.ask(drain, vec![]).await);
    drop(old_agent);
    drop(old);
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.store(true, Ordering::Relaxed);
    assert!(client.join().expect("no question was lost") > 10);
    done(agent.ask(remove_pod("a", false), vec![]).await);
    unanswered(&netns).await;
}
