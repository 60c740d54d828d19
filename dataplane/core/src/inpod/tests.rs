use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::{TestNetns, config, dial};
use super::*;
use crate::config::{Config, Keepalive};

fn current_netns() -> std::path::PathBuf {
    std::fs::read_link("/proc/thread-self/ns/net").expect("proc is mounted")
}

/// Waits, because a program that another test starts holds copies of our descriptors between its
/// fork and its exec.
async fn freed(ns: &Netns, addr: &str) {
    let wait = async {
        while dial(ns, addr).is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let freed = tokio::time::timeout(Duration::from_secs(10), wait).await;
    assert!(freed.is_ok(), "somebody still listens at {addr}");
}

#[test]
fn only_a_network_namespace_is_accepted() {
    let error = |path: &str| {
        let fd = std::fs::File::open(path).expect("exists").into();
        Netns::new(fd).map(|_| ()).expect_err(path).to_string()
    };
    assert!(error("/proc/version").contains("an ordinary file"));
    assert!(error("/proc/self/ns/mnt").contains("a mount namespace"));
    assert!(error("/proc/self/ns/pid").contains("a pid namespace"));
    assert!(error("/proc/self/ns/uts").contains("another kind of namespace"));
    let ns = TestNetns::new();
    assert_eq!(ns.open().id(), ns.open().id());
    assert_ne!(ns.open().id(), Netns::own().expect("ours").id());
}

#[test]
fn the_thread_comes_home_after_a_visit_and_after_a_panic() {
    let ns = TestNetns::new().open();
    let home = current_netns();
    let away = ns.enter(current_netns).expect("may enter");
    assert_ne!(away, home);
    assert_eq!(current_netns(), home);
    let panicked = std::panic::catch_unwind(|| ns.enter(|| panic!("in the pod")));
    assert!(panicked.is_err());
    assert_eq!(current_netns(), home);
}

#[test]
fn the_abilities_a_pod_needs_are_there() {
    check_abilities().expect("tests run as root");
}

#[tokio::test]
async fn listens_on_three_ports_for_both_families() {
    let test = TestNetns::new();
    let ns = test.open();
    let config = config();
    let listeners = Listeners::bind(&ns, &config).expect("free ports");
    let redirected = listeners.redirected.as_ref().expect("a pod's");
    for (listener, port) in [
        (&redirected.outbound, 15001),
        (&redirected.inbound_plaintext, 15006),
        (&listeners.inbound_hbone, 15008),
    ] {
        assert_eq!(listener.local_addr().unwrap().port(), port);
        let socket = SockRef::from(listener);
        assert_eq!(socket.mark().unwrap(), 0x539);
        assert!(socket.ip_transparent_v4().unwrap());
        assert!(!socket.reuse_port().unwrap());
        for client in ["10.99.0.1", "[fd99::1]"] {
            let dialled = format!("{client}:{port}");
            dial(&ns, &dialled).expect(&dialled);
            let (accepted, peer) = listener.accept().await.unwrap();
            let accepted = SockRef::from(&accepted);
            assert!(accepted.keepalive().unwrap());
            assert_eq!(accepted.tcp_keepalive_time().unwrap().as_secs(), 180);
            let expected: IpAddr = client.trim_matches(['[', ']']).parse().unwrap();
            assert_eq!(peer.ip().to_canonical(), expected);
        }
    }
}

#[tokio::test]
async fn the_agents_own_workload_listens_for_hbone_alone() {
    let test = TestNetns::new();
    let (ns, config) = (test.open(), config());
    let listeners = Listeners::bind_hbone(&ns, &config).expect("a free port");
    let adopted = Listeners::adopt(listeners.duplicate().unwrap().0, &config, false);
    drop(listeners);
    let adopted = adopted.expect("it listens");
    dial(&ns, "10.99.0.1:15008").expect("HBONE");
    adopted.inbound_hbone.accept().await.expect("dialled");
    for port in [15001, 15006] {
        let refused = dial(&ns, &format!("10.99.0.1:{port}")).expect_err("nobody listens");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
}

#[tokio::test]
async fn keepalive_and_user_timeout_are_as_configured_on_accepted_and_on_own_sockets() {
    let seconds = Duration::from_secs;
    let wanted = Keepalive {
        time: seconds(7),
        interval: seconds(3),
        retries: 4,
        user_timeout: true,
    };
    for keepalive in [Some(wanted), None] {
        let ns = Arc::new(TestNetns::new().open());
        let config = Config {
            keepalive,
            ..config()
        };
        let bound = Listeners::bind(&ns, &config).expect("free ports");
        // A successor brings its own settings.
        let settings = Config {
            keepalive: keepalive.map(|k| Keepalive { retries: 5, ..k }),
            ..config.clone()
        };
        for (listeners, retries) in [(None, 4), (Some(settings), 5)] {
            let adopted = listeners.map(|config| {
                Listeners::adopt(bound.duplicate().unwrap().0, &config, true).expect("they listen")
            });
            let listener = &adopted.as_ref().unwrap_or(&bound).inbound_hbone;
            let dst = "10.99.0.1:15008".parse().unwrap();
            let ours = ns.connect(&config, dst, None).await.expect("listens");
            let (accepted, _) = listener.accept().await.unwrap();
            for (stream, retries) in [(&ours, 4), (&accepted, retries)] {
                let socket = SockRef::from(stream);
                assert_eq!(socket.keepalive().unwrap(), keepalive.is_some());
                let limit = socket.tcp_user_timeout().unwrap();
                if keepalive.is_some() {
                    assert_eq!(socket.tcp_keepalive_time().unwrap(), seconds(7));
                    assert_eq!(socket.tcp_keepalive_interval().unwrap(), seconds(3));
                    assert_eq!(socket.tcp_keepalive_retries().unwrap(), retries);
                    assert_eq!(limit, Some(seconds(7 + 3 * u64::from(retries))));
                } else {
                    assert_eq!(limit, None);
                }
            }
        }
    }
}

#[tokio::test]
async fn without_ipv6_it_listens_on_ipv4() {
    let ns = TestNetns::new().open();
    let mut config = config();
    config.ipv6 = false;
    let listeners = Listeners::bind(&ns, &config).expect("free ports");
    let redirected = listeners.redirected.expect("a pod's");
    assert!(redirected.outbound.local_addr().unwrap().is_ipv4());
    dial(&ns, "10.99.0.1:15001").expect("somebody listens");
}

#[tokio::test]
async fn a_taken_port_is_named_and_nothing_stays_bound() {
    let ns = TestNetns::new().open();
    let config = config();
    let other = ns
        .enter(|| StdListener::bind("0.0.0.0:15008"))
        .unwrap()
        .unwrap();
    let error = Listeners::bind(&ns, &config).expect_err("15008 is taken");
    assert!(matches!(error, ListenError::InUse { port: 15008 }));
    let text = error.to_string();
    assert!(text.contains("15008") && text.contains("another"), "{text}");
    freed(&ns, "10.99.0.1:15001").await;
    drop(other);
    freed(&ns, "10.99.0.1:15008").await;
    Listeners::bind(&ns, &config).expect("free again");
}

#[tokio::test]
async fn nobody_in_the_pod_can_join_a_listeners_port() {
    let ns = TestNetns::new().open();
    let _listeners = Listeners::bind(&ns, &config()).expect("free ports");
    for (domain, addr) in [
        (Domain::IPV6, "[::]:15001"),
        (Domain::IPV4, "0.0.0.0:15001"),
        (Domain::IPV4, "127.0.0.1:15001"),
    ] {
        let socket = ns.enter(|| Socket::new(domain, Type::STREAM, None));
        let socket = socket.unwrap().unwrap();
        #[allow(clippy::disallowed_methods)] // this is the attacker
        socket.set_reuse_port(true).unwrap();
        socket.set_reuse_address(true).unwrap();
        let addr: SocketAddr = addr.parse().unwrap();
        let joined = socket.bind(&addr.into()).and_then(|()| socket.listen(16));
        assert_eq!(joined.unwrap_err().kind(), ErrorKind::AddrInUse, "{addr}");
    }
}

#[tokio::test]
async fn adopted_listeners_accept_what_was_queued_before() {
    let ns = TestNetns::new().open();
    let config = config();
    let old = Listeners::bind(&ns, &config).expect("free ports");
    let _queued = dial(&ns, "10.99.0.1:15006").expect("queued");
    let fds = old.duplicate().unwrap();
    drop(old);
    let adopted = Listeners::adopt(fds.0, &config, true).expect("they listen");
    let redirected = adopted.redirected.as_ref().expect("a pod's");
    redirected.inbound_plaintext.accept().await.expect("queued");
}

#[tokio::test]
async fn adopts_only_listening_tcp_sockets_of_the_right_ports() {
    let ns = TestNetns::new().open();
    let config = config();
    let bound = Listeners::bind(&ns, &config).expect("free ports");
    let refused = |port: u16, fd| {
        let mut fds = bound.duplicate().unwrap().0;
        fds.retain(|(p, _)| *p != port);
        fds.push((port, fd));
        let error = Listeners::adopt(fds, &config, true).expect_err("foreign");
        error.to_string()
    };
    let file = std::fs::File::open("/proc/version").unwrap().into();
    assert!(refused(15001, file).contains("is no TCP socket"));
    let idle = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    assert!(refused(15001, idle.into()).contains("doesn't listen"));
    let hbone = bound.duplicate().unwrap().0.remove(0).1;
    assert!(refused(15001, hbone).contains("listens on [::]:15008"));
    let error = Listeners::adopt(Vec::new(), &config, true).expect_err("none");
    assert!(error.to_string().contains("15008 is missing"));
}

#[tokio::test]
async fn connects_inside_the_namespace_with_mark_and_without_delay() {
    let ns = Arc::new(TestNetns::new().open());
    let server = ns.enter(|| StdListener::bind("10.99.0.1:80")).unwrap();
    let server = server.unwrap();
    let dst = "10.99.0.1:80".parse().unwrap();
    let stream = ns.connect(&config(), dst, None).await.expect("listens");
    assert_eq!(SockRef::from(&stream).mark().unwrap(), 0x539);
    assert!(stream.nodelay().unwrap());
    assert!(SockRef::from(&stream).keepalive().unwrap());
    let (_, peer) = server.accept().unwrap();
    assert_eq!(peer, stream.local_addr().unwrap());
    // A v4-mapped destination is the IPv4 one.
    let mapped = "[::ffff:10.99.0.1]:80".parse().unwrap();
    ns.connect(&config(), mapped, None).await.expect("the same");
}

#[tokio::test]
async fn the_application_sees_the_source_that_was_asked_for() {
    let test = TestNetns::new();
    // Answers to the foreign address come back to the socket: what the redirection's routes do.
    test.ip("route add local 192.0.2.0/24 dev lo");
    test.ip("-6 route add local 2001:db8::/64 dev lo");
    let ns = Arc::new(test.open());
    for (app, source) in [
        ("10.99.0.1:80", "192.0.2.7"),
        ("[fd99::1]:80", "2001:db8::7"),
    ] {
        let app: SocketAddr = app.parse().unwrap();
        let source: IpAddr = source.parse().unwrap();
        let server = ns.enter(|| StdListener::bind(app)).unwrap().unwrap();
        let mapped = match source {
            IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
            v6 => v6,
        };
        for source_as_given in [source, mapped] {
            let connect = ns.connect(&config(), app, Some(source_as_given)).await;
            let mut client = connect.expect("spoofed");
            let (mut served, peer) = server.accept().unwrap();
            assert_eq!(peer.ip(), source);
            client.write_all(b"ping").await.unwrap();
            let mut got = [0; 4];
            served.read_exact(&mut got).unwrap();
            served.write_all(b"pong").unwrap();
            client.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"pong");
        }
    }
}

#[tokio::test]
async fn a_source_of_the_other_family_is_an_error() {
    let ns = Arc::new(TestNetns::new().open());
    let _server = ns.enter(|| StdListener::bind("10.99.0.1:80")).unwrap();
    let dst = "10.99.0.1:80".parse().unwrap();
    let source = Some("2001:db8::7".parse().unwrap());
    let error = ns.connect(&config(), dst, source).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("2001:db8::7"), "{error}");
}

#[tokio::test]
async fn the_original_destination_is_what_the_client_dialled() {
    let test = TestNetns::new();
    test.ip("addr add 10.99.0.2/32 dev lo");
    test.nft(
        "table inet t { chain o { type nat hook output priority -100; \
         tcp dport 7777 redirect to :15001; }; }",
    );
    let ns = test.open();
    let listeners = Listeners::bind(&ns, &config()).expect("free ports");
    let redirected = listeners.redirected.expect("a pod's");
    for dialled in ["10.99.0.2:7777", "[fd99::1]:7777"] {
        let _client = dial(&ns, dialled).expect("redirected");
        let (stream, _) = redirected.outbound.accept().await.unwrap();
        assert_eq!(original_dst(&stream).unwrap(), dialled.parse().unwrap());
    }
}

#[tokio::test]
async fn a_connection_made_to_the_listener_has_no_original_destination() {
    let plain = TestNetns::new();
    let tracked = TestNetns::new();
    // Conntrack is on, but nothing is translated.
    tracked.nft(
        "table inet t { chain o { type nat hook output priority -100; \
         tcp dport 7777 redirect to :15001; }; }",
    );
    for ns in [plain.open(), tracked.open()] {
        let listeners = Listeners::bind(&ns, &config()).expect("free ports");
        let redirected = listeners.redirected.expect("a pod's");
        for dialled in ["10.99.0.1:15001", "[fd99::1]:15001"] {
            let _client = dial(&ns, dialled).expect("listens");
            let (stream, _) = redirected.outbound.accept().await.unwrap();
            let error = original_dst(&stream).unwrap_err();
            assert!(error.to_string().contains(dialled), "{error}");
        }
    }
}

#[tokio::test]
async fn dns_listens_on_loopback_alone_and_lets_nobody_join() {
    let test = TestNetns::new();
    let ns = test.open();
    let sockets = DnsSockets::bind(&ns, &config()).expect("free ports");
    assert_eq!((sockets.udp.len(), sockets.tcp.len()), (2, 2));
    for socket in &sockets.udp {
        let local = socket.local_addr().unwrap();
        assert!(local.ip().is_loopback() && local.port() == 15053, "{local}");
        let socket = SockRef::from(socket);
        assert_eq!(socket.mark().unwrap(), 0x539);
        assert!(!socket.reuse_port().unwrap() && !socket.reuse_address().unwrap());
        let joined = ns.enter(|| {
            let other = Socket::new(Domain::for_address(local), Type::DGRAM, None)?;
            other.set_reuse_address(true)?;
            other.bind(&local.into())
        });
        assert_eq!(joined.unwrap().unwrap_err().kind(), ErrorKind::AddrInUse);
    }
    dial(&ns, "127.0.0.1:15053").expect("somebody listens");
    dial(&ns, "[::1]:15053").expect("somebody listens");
    assert!(dial(&ns, "10.99.0.1:15053").is_err());
    // The second of them gets nothing, and the first one nothing twice.
    let error = DnsSockets::bind(&ns, &config()).expect_err("the ports are taken");
    assert!(
        matches!(error, ListenError::InUse { port: 15053 }),
        "{error}"
    );
}

#[tokio::test]
async fn dns_from_outside_the_pod_does_not_arrive_even_where_the_pod_lets_loopback_in() {
    let (pod, outside) = (TestNetns::new(), TestNetns::new());
    let link = format!(
        "link add eth0 type veth peer name eth0 netns {}",
        outside.name
    );
    pod.ip(&link);
    for (ns, address) in [(&pod, "10.98.7.1/24"), (&outside, "10.98.7.2/24")] {
        ns.ip(&format!("addr add {address} dev eth0"));
        ns.ip("link set eth0 up");
        for name in ["all", "eth0"] {
            let path = format!("/proc/sys/net/ipv4/conf/{name}/route_localnet");
            let net = ns.open();
            net.enter(|| std::fs::write(path, "1")).unwrap().unwrap();
        }
    }
    outside.ip("addr del 127.0.0.1/8 dev lo");
    outside.ip("route add 127.0.0.1/32 via 10.98.7.1 src 10.98.7.2");
    let ns = pod.open();
    let theirs = outside.open();
    let send = |to: &str| {
        let sent = theirs.enter(|| std::net::UdpSocket::bind("10.98.7.2:0")?.send_to(b"hi", to));
        sent.unwrap().unwrap();
    };
    let probe = ns
        .enter(|| std::net::UdpSocket::bind("127.0.0.1:9999"))
        .unwrap()
        .unwrap();
    probe
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let sockets = DnsSockets::bind(&ns, &config()).expect("free ports");
    send("127.0.0.1:15053");
    // What was sent later has arrived at a socket without the bond to lo: the way is open.
    send("127.0.0.1:9999");
    probe
        .recv(&mut [0; 8])
        .expect("the world of this test lets loopback in");
    let nothing = sockets.udp[0].try_recv(&mut [0; 8]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
}

#[tokio::test]
async fn received_dns_sockets_are_what_they_are_said_to_be() {
    let test = TestNetns::new();
    let ns = test.open();
    let sockets = DnsSockets::bind(&ns, &config()).expect("free ports");
    let mut fds = sockets.duplicate().unwrap().0;
    assert_eq!(fds.len(), 4);
    let adopted = DnsSockets::adopt(&mut fds, &config())
        .unwrap()
        .expect("all are there");
    drop(sockets);
    assert_eq!((adopted.udp.len(), adopted.tcp.len()), (2, 2));
    let asked = ns
        .enter(|| std::net::UdpSocket::bind("127.0.0.1:0"))
        .unwrap()
        .unwrap();
    asked.send_to(b"hi", "127.0.0.1:15053").unwrap();
    adopted.udp[0].recv(&mut [0; 8]).await.unwrap();

    assert!(
        DnsSockets::adopt(&mut Vec::new(), &config())
            .unwrap()
            .is_none()
    );
    let wrong = ns
        .enter(|| std::net::UdpSocket::bind("0.0.0.0:0"))
        .unwrap()
        .unwrap();
    let error = DnsSockets::adopt(&mut vec![(15053, wrong.into())], &config()).unwrap_err();
    assert!(error.to_string().contains("is bound to"), "{error}");
}

#[tokio::test]
async fn without_ipv6_dns_listens_on_ipv4() {
    let test = TestNetns::new();
    let ns = test.open();
    let disable = |name: &str| {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        ns.enter(|| std::fs::write(path, "1")).unwrap().unwrap();
    };
    disable("all");
    disable("lo");
    let sockets = DnsSockets::bind(&ns, &config()).expect("::1 isn't needed");
    assert_eq!((sockets.udp.len(), sockets.tcp.len()), (1, 1));
}
