//! Questions that aren't ours: nothing of them or of their answers is lost on the way.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType::{A, MX, TXT};
use parking_lot::Mutex;

use super::testing::*;
use super::{Resolv, wire};
use crate::state::fixture::{Push, pod};

/// Of example.com, TTL 60, MINIMUM 30.
const SOA: &[u8] = b"\xc0\x0c\x00\x06\x00\x01\x00\x00\x00\x3c\x00\x16\x00\x00\
    \0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0\x1e";
const CODE: u8 = 3;

fn mesh() -> Push {
    Push::addresses().workload(pod("ns1", "web", "10.99.0.1"))
}

fn world(nameservers: &[&str]) -> World {
    World::new(&raw(nameservers), mesh())
}

fn packet(name: &str) -> Vec<u8> {
    question(name, A).to_vec().unwrap()
}

#[tokio::test]
async fn flags_options_authority_and_codes_survive() {
    let world = world(&["10.99.0.1"]);
    let seen: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let record = seen.clone();
    // NXDOMAIN with its SOA and an option; the code is that of the first label.
    world.nameserver("10.99.0.1:53", move |query, _| {
        record.lock().push(query.to_vec());
        let code = query[13] - b'0';
        let opt = b"\x00\x00\x29\x04\xd0\x00\x00\x80\x00\x00\x08\x00\x0f\x00\x04\x00\x12hi";
        Some(reply(query, code, [0, 1, 1], &[SOA, opt].concat()))
    });
    for code in [0, 2, CODE, 4, 5, 9] {
        let mut query = question(&format!("{code}.example.com"), MX)
            .to_vec()
            .unwrap();
        // Checking disabled, and a cookie.
        query[3] |= 0x10;
        query[11] = 1;
        query.extend_from_slice(
            b"\x00\x00\x29\x04\xd0\x00\x00\x80\x00\x00\x0c\x00\x0a\x00\x08cookies!",
        );
        for answer in [world.udp(&query).await, world.tcp(&query).await] {
            let sent = seen.lock().last().unwrap().clone();
            // What the nameserver got is the client's but for the id, and what it said came back.
            assert_eq!(sent[2..], query[2..]);
            assert_ne!(
                sent[..2],
                query[..2],
                "an id of our own (fails once in 65536 runs)"
            );
            let opt = b"\x00\x00\x29\x04\xd0\x00\x00\x80\x00\x00\x08\x00\x0f\x00\x04\x00\x12hi";
            let mut expected = reply(&query, code, [0, 1, 1], &[SOA, opt].concat());
            wire::set_id(&mut expected, u16::from_be_bytes([query[0], query[1]]));
            assert_eq!(answer, expected, "code {code}");
        }
    }
}

#[tokio::test]
async fn a_truncated_answer_is_fetched_over_tcp_for_a_client_of_tcp_only() {
    let world = world(&["10.99.0.1"]);
    world.nameserver("10.99.0.1:53", |query, tcp| {
        let mut answer = reply(query, 0, [1, 0, 0], &a_record([203, 0, 113, 9], 0));
        if !tcp {
            answer = reply(query, 0, [0; 3], b"");
            answer[2] |= 0x02;
        }
        Some(answer)
    });
    let udp = Message::from_vec(&world.udp(&packet("example.com")).await).unwrap();
    assert!(udp.metadata.truncation && udp.answers.is_empty());
    let tcp = world.tcp(&packet("example.com")).await;
    assert_eq!(shown(&tcp), "example.com. 203.0.113.9");
}

#[tokio::test]
async fn a_dead_first_nameserver_costs_a_moment_once_and_a_refusing_one_nothing() {
    let world = world(&["10.99.0.3", "10.99.0.1"]);
    world.ns.ip("addr add 10.99.0.3/32 dev lo");
    let silent = world.nameserver("10.99.0.3:53", |_, _| None);
    let good = world.nameserver("10.99.0.1:53", |query, _| {
        Some(reply(query, 0, [1, 0, 0], &a_record([203, 0, 113, 9], 0)))
    });
    let start = Instant::now();
    let answer = world.udp(&packet("one.example.com")).await;
    assert_eq!(shown(&answer), "one.example.com. 203.0.113.9");
    // A fifth of the time limit of one second, not all of it.
    assert!(
        start.elapsed() < Duration::from_millis(900),
        "{:?}",
        start.elapsed()
    );
    assert_eq!((silent.count(), good.count()), (1, 1));

    // Nobody listens there, which ICMP says at once.
    let refusing = Resolv {
        nameservers: vec![addr("10.99.0.3:54"), addr("10.99.0.1:53")],
        search: vec![],
    };
    world.proxy.configure_dns(Some(refusing));
    let start = Instant::now();
    let answer = world.udp(&packet("two.example.com")).await;
    assert_eq!(shown(&answer), "two.example.com. 203.0.113.9");
    assert!(
        start.elapsed() < Duration::from_millis(190),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn the_failure_of_one_nameserver_counts_only_when_no_other_answers() {
    let world = world(&["10.99.0.1", "10.99.0.3"]);
    world.ns.ip("addr add 10.99.0.3/32 dev lo");
    world.nameserver("10.99.0.1:53", |query, _| {
        Some(reply(query, 5, [0; 3], b""))
    });
    world.nameserver("10.99.0.3:53", |query, _| {
        let known = query.windows(4).any(|part| part == b"good");
        let code = if known { 3 } else { 2 };
        Some(reply(query, code, [0; 3], b""))
    });
    assert_eq!(
        shown(&world.udp(&packet("good.example.com")).await),
        "NXDomain"
    );
    assert_eq!(
        shown(&world.udp(&packet("bad.example.com")).await),
        "Refused"
    );
}

#[tokio::test]
async fn without_an_answer_the_client_is_told_servfail_and_it_counts() {
    let world = world(&["10.99.0.1"]);
    let silent = world.nameserver("10.99.0.1:53", |_, _| None);
    let answer = world.udp(&packet("example.com")).await;
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    // A lost datagram is sent again.
    assert_eq!(silent.count(), 2);
    let metrics = world.metrics();
    for expected in [
        "istio_dns_requests_total{request_query_type=\"a\",request_protocol=\"udp\"",
        "istio_dns_upstream_failures_total{request_query_type=\"a\"",
        "istio_dns_upstream_request_duration_seconds_count{request_query_type=\"a\"",
    ] {
        assert!(metrics.contains(expected), "{expected}: {metrics}");
    }
    let nobody = World::new(&raw(&[]), mesh());
    assert_eq!(shown(&nobody.udp(&packet("example.com")).await), "ServFail");
    assert!(
        nobody
            .metrics()
            .contains("underpass_dns_refused_total{reason=\"no_nameserver\"} 1")
    );
}

#[tokio::test]
async fn answers_to_something_else_are_not_believed() {
    let world = world(&["10.99.0.1"]);
    let turn = AtomicUsize::new(0);
    world.nameserver("10.99.0.1:53", move |query, _| {
        let mut answer = reply(query, 0, [1, 0, 0], &a_record([203, 0, 113, 9], 0));
        // The first time another id, the second time another name.
        match turn.fetch_add(1, Ordering::SeqCst) {
            0 => answer[0] ^= 1,
            1 => answer[14] ^= 1,
            _ => {}
        }
        Some(answer)
    });
    let answer = world.udp(&packet("example.com")).await;
    assert_eq!(shown(&answer), "ServFail");
    assert!(
        world
            .metrics()
            .contains("underpass_dns_foreign_answers_total 2")
    );
    let answer = world.udp(&packet("example.com")).await;
    assert_eq!(shown(&answer), "example.com. 203.0.113.9");
}

#[tokio::test]
async fn an_answer_is_kept_for_its_life_for_the_same_question_and_nameservers() {
    let world = world(&["10.99.0.1"]);
    let server = world.nameserver("10.99.0.1:53", |query, _| {
        Some(match query.windows(4).any(|part| part == b"none") {
            true => reply(query, CODE, [0, 1, 0], SOA),
            false => reply(query, 0, [1, 0, 0], &a_record([203, 0, 113, 9], 60)),
        })
    });
    for name in ["example.com", "EXAMPLE.com", "example.com"] {
        let query = packet(name);
        let answer = world.udp(&query).await;
        assert_eq!(shown(&answer), format!("{name}. 203.0.113.9"));
        assert_eq!(answer[..2], query[..2]);
    }
    assert_eq!(server.count(), 1);
    world.tcp(&packet("example.com")).await;
    assert_eq!(server.count(), 1);
    for _ in 0..2 {
        let answer = world.udp(&packet("none.example.com")).await;
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(answer.authorities.len(), 1);
    }
    assert_eq!(server.count(), 2);
    assert!(
        world.metrics().contains("underpass_dns_cache_hits_total 4"),
        "{}",
        world.metrics()
    );
    assert!(world.metrics().contains("underpass_dns_cache_entries 2"));
    // Another type or other flags are another question, other nameservers another authority.
    world
        .udp(&question("example.com", TXT).to_vec().unwrap())
        .await;
    world
        .udp(
            &with_payload(question("example.com", A), 1232)
                .to_vec()
                .unwrap(),
        )
        .await;
    assert_eq!(server.count(), 4);
    let other = Resolv {
        nameservers: vec![addr("10.99.0.1:53"), addr("10.99.0.1:54")],
        search: vec![],
    };
    world.proxy.configure_dns(Some(other));
    world.udp(&packet("example.com")).await;
    assert_eq!(server.count(), 5);
}

#[tokio::test]
async fn a_pod_may_wait_for_so_many_answers_and_no_more() {
    let mut raw = raw(&["10.99.0.1"]);
    raw.dns.as_mut().unwrap().pod_max_pending = 4;
    let world = World::new(&raw, mesh());
    let silent = world.nameserver("10.99.0.1:53", |_, _| None);
    let socket = world.socket("127.0.0.1:0");
    socket.connect("127.0.0.1:15053").await.unwrap();
    for n in 0..4 {
        socket
            .send(&packet(&format!("n{n}.example.com")))
            .await
            .unwrap();
    }
    within(async {
        while silent.count() < 4 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let refused = world.udp(&packet("more.example.com")).await;
    assert_eq!(shown(&refused), "ServFail");
    assert!(
        world
            .metrics()
            .contains("underpass_dns_refused_total{reason=\"pending\"} 1")
    );
    let mut answer = [0; 512];
    for _ in 0..4 {
        within(socket.recv(&mut answer)).await.unwrap();
    }
}

#[tokio::test]
async fn ten_thousand_questions_leave_nothing_behind() {
    let mut raw = raw(&["10.99.0.1"]);
    raw.dns.as_mut().unwrap().cache_entries = 64;
    let world = World::new(&raw, mesh());
    let seen: Mutex<HashSet<Vec<u8>>> = Mutex::default();
    world.nameserver("10.99.0.1:53", move |query, _| {
        // One in a hundred is lost when it comes first.
        let mut seen = seen.lock();
        let lost = seen.insert(query[12..].to_vec()) && seen.len() % 100 == 7;
        (!lost).then(|| reply(query, 0, [1, 0, 0], &a_record([203, 0, 113, 9], 60)))
    });
    let world = Arc::new(world);
    world.udp(&packet("first.example.com")).await;
    let tasks = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    let mut clients = Vec::new();
    for client in 0..20 {
        let world = world.clone();
        clients.push(tokio::spawn(async move {
            for n in 0..500 {
                let query = packet(&format!("n{n}.c{client}.example.com"));
                let answer = match n % 50 {
                    0 => world.tcp(&query).await,
                    _ => world.udp(&query).await,
                };
                assert_eq!(wire::rcode(&answer), 0, "client {client}, question {n}");
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(world.shared.dns_cache.held(), 64);
    let alive = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    within(async {
        while alive() > tasks {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(world.metrics().contains("underpass_dns_cache_entries 64"));
    world.proxy.cut().await;
}

#[tokio::test]
async fn questions_of_one_connection_are_answered_in_turn_until_it_is_idle() {
    let world = world(&["10.99.0.1"]);
    world.nameserver("10.99.0.1:53", |query, _| {
        Some(reply(query, 0, [1, 0, 0], &a_record([203, 0, 113, 9], 0)))
    });
    let mut stream = world.connect().await;
    for name in ["one.example.com", "two.example.com"] {
        let answer = over(&mut stream, &packet(name)).await;
        assert_eq!(shown(&answer), format!("{name}. 203.0.113.9"));
    }
    let start = Instant::now();
    let end = within(tokio::io::AsyncReadExt::read_u8(&mut stream)).await;
    assert!(end.is_err());
    let idle = start.elapsed().as_secs_f64();
    assert!((4.5..10.0).contains(&idle), "{idle}");
}

#[tokio::test]
async fn a_stopped_proxy_frees_its_sockets_and_may_serve_again() {
    let world = world(&["10.99.0.1"]);
    world.proxy.stop_dns();
    let bind = || crate::inpod::DnsSockets::bind(&world.netns, &world.shared.config);
    let sockets = within(async {
        loop {
            match bind() {
                Ok(sockets) => return sockets,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    })
    .await;
    world.proxy.serve_dns(sockets);
    assert_eq!(
        world.udp(b"\x00\x07\x00\x00\x00\x02\0\0\0\0\0\0").await[..4],
        [0, 7, 0x80, 1]
    );
}
