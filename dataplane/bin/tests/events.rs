//! What the process tells its agent by itself, and tells again to the next one.

mod node;

use node::client::{Client, done};
use node::netns::Netns;
use node::process::Dataplane;
use node::records::{identity, pod, policies, workloads};
use pb::event::Event;
use pb::request::Body as Ask;
use underpass_core::wire::control as pb;

fn wanted(account: &str) -> impl Fn(&Event) -> bool {
    let identity = identity(account);
    move |event| matches!(event, Event::CertificateWanted(w) if w.identity == identity)
}

fn start() -> (Dataplane, Client, Netns) {
    let (dataplane, netns) = (Dataplane::start(), Netns::new());
    let agent = dataplane.agent("n");
    (dataplane, agent, netns)
}

#[test]
fn the_first_response_of_each_type_is_announced_once() {
    let (_dataplane, mut agent, _netns) = start();
    assert!(!agent.hello.synced);
    for _ in 0..2 {
        agent.apply(workloads(&[]));
        agent.apply(policies(&[]));
    }
    agent
        .event(|event| matches!(event, Event::FirstResponse(f) if f.type_url.ends_with("Address")));
    agent.event(
        |event| matches!(event, Event::FirstResponse(f) if f.type_url.ends_with("Authorization")),
    );
    let firsts = agent.events.iter();
    let again = firsts.filter(|event| matches!(event, Event::FirstResponse(_)));
    assert_eq!(again.count(), 0);
}

#[test]
fn a_certificate_is_wanted_when_the_pods_record_arrives_and_again_by_a_new_agent() {
    let (dataplane, mut agent, netns) = start();
    agent.add("a", "web", &netns, false);
    assert_eq!(agent.pods()[0].identity, "");
    agent.apply(workloads(&[pod("n", "a", "web", &["10.98.0.1"])]));
    agent.event(wanted("web"));
    let pods = agent.pods();
    assert_eq!(pods[0].identity, identity("web"));
    assert_eq!(pods[0].workload_uid, "Kubernetes//Pod/shop/a");
    drop(agent);
    let mut agent = dataplane.agent("n");
    agent.event(wanted("web"));
}

#[test]
fn a_certificate_is_forgotten_with_the_last_pod_of_its_identity() {
    let (_dataplane, mut agent, netns) = start();
    let other = Netns::new();
    agent.apply(workloads(&[
        pod("n", "a", "web", &["10.98.0.1"]),
        pod("n", "b", "web", &["10.98.0.2"]),
    ]));
    agent.add("a", "web", &netns, false);
    agent.add("b", "web", &other, false);
    agent.event(wanted("web"));
    let remove = |uid: &str| {
        Ask::RemovePod(pb::RemovePod {
            uid: uid.into(),
            ..Default::default()
        })
    };
    let forgotten = |event: &Event| matches!(event, Event::CertificateForgotten(_));
    done(agent.ask(remove("a")));
    assert_eq!(agent.pods().len(), 1);
    assert!(!agent.events.iter().any(forgotten));
    done(agent.ask(remove("b")));
    agent.event(forgotten);
}

#[test]
fn responses_take_effect_in_the_order_they_were_sent() {
    let (dataplane, mut agent, _netns) = start();
    // All sent before the first answer is read.
    let sent: Vec<_> = (0..50u8)
        .map(|number| {
            let address = format!("10.98.1.{number}");
            let response = workloads(&[pod("n", "a", "web", &[&address])]);
            agent.send(Ask::Apply(pb::Apply { response }), &[])
        })
        .collect();
    for id in sent {
        let mut reply = agent.receive();
        if reply.id == 0 {
            reply = agent.receive();
        }
        assert_eq!(reply.id, id);
    }
    let mut observer = Client::observer(&dataplane.socket);
    let section = "workloads".into();
    let dump = observer.chunks(Ask::Dump(pb::Dump { section }));
    let dump = String::from_utf8(dump).expect("JSON");
    assert!(dump.contains("10.98.1.49"), "{dump}");
}
