//! The process: its exit codes, its own cgroup, signals, and what it leaves behind.

mod node;

use node::client::{Client, done};
use node::eventually;
use node::netns::Netns;
use node::process::{Dataplane, cgroup2, command};
use pb::request::Body as Ask;
use rustix::process::Signal;
use underpass_core::wire::control as pb;

#[test]
fn mistakes_end_with_a_code_that_tells_their_kind() {
    let case = |args: &[&str]| {
        let output = command().args(args).output().expect("built by cargo");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), text)
    };
    let (code, text) = case(&[]);
    assert_eq!(code, Some(64));
    assert!(text.contains("--socket"), "{text}");
    assert_eq!(case(&["--nonsense"]).0, Some(64));
    let root = cgroup2().display().to_string();
    let (code, text) = case(&["--socket", "/nonexistent/s", "--cgroup", &root]);
    assert_eq!(code, Some(69));
    assert!(text.contains("is the root"), "{text}");
    let (code, text) = case(&["--socket", "/nonexistent/s"]);
    assert_eq!(code, Some(73));
    assert!(text.contains("/nonexistent/s"), "{text}");
    assert_eq!(case(&["version"]).0, Some(0));
}

#[test]
fn without_capabilities_it_says_which_one_is_missing() {
    let mut dropped = std::process::Command::new("setpriv");
    dropped.args(["--bounding-set=-all", "--inh-caps=-all"]);
    dropped.args([
        env!("CARGO_BIN_EXE_underpass-dataplane"),
        "--socket",
        "/nonexistent/s",
    ]);
    let output = dropped.output().expect("util-linux is installed");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{text}");
    assert!(text.contains("CAP_SYS_ADMIN"), "{text}");
}

#[test]
fn it_lives_alone_in_its_cgroup_and_cannot_be_dumped() {
    let dataplane = Dataplane::start();
    let agent = dataplane.agent("n");
    assert_eq!(agent.hello.cgroup, dataplane.cgroup.display().to_string());
    assert_eq!(agent.hello.pid, dataplane.pid());
    let procs = std::fs::read_to_string(dataplane.cgroup.join("cgroup.procs")).unwrap();
    assert_eq!(procs.trim(), dataplane.pid().to_string());
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", dataplane.pid())).unwrap();
    let cores = limits.lines().find(|line| line.starts_with("Max core"));
    let cores: Vec<_> = cores.unwrap().split_whitespace().collect();
    assert_eq!(cores[4..6], ["0", "0"]);
}

#[test]
fn a_second_process_on_the_same_socket_names_the_first() {
    let first = Dataplane::start();
    let second = command().arg("--socket").arg(&first.socket).output();
    let second = second.expect("built by cargo");
    assert_eq!(second.status.code(), Some(73));
    let text = String::from_utf8_lossy(&second.stderr);
    let named = format!("in use by pid {}", first.pid());
    assert!(text.contains(&named), "{text}");
    first.agent("n");
}

#[test]
fn sigterm_ends_it_with_success_and_without_its_socket() {
    let netns = Netns::new();
    let mut dataplane = Dataplane::start();
    let mut agent = dataplane.agent("n");
    agent.add("a", "web", &netns, false);
    dataplane.signal(Signal::TERM);
    assert!(dataplane.wait().success());
    assert!(!dataplane.socket.exists());
}

#[test]
fn sighup_and_the_agents_end_change_nothing() {
    let netns = Netns::new();
    let mut dataplane = Dataplane::start();
    let mut agent = dataplane.agent("n");
    agent.add("a", "web", &netns, false);
    drop(agent);
    dataplane.signal(Signal::HUP);
    let mut observer = Client::observer(&dataplane.socket);
    assert_eq!(observer.pods().len(), 1);
    assert!(dataplane.runs());
}

#[test]
fn a_drain_request_with_exit_is_answered_before_the_end() {
    let mut dataplane = Dataplane::start();
    let mut agent = dataplane.agent("n");
    let drain = pb::Drain {
        deadline_ms: 100,
        exit: true,
    };
    done(agent.ask(Ask::Drain(drain)));
    assert!(dataplane.wait().success());
}

#[test]
fn pods_and_clients_that_left_leave_no_descriptor() {
    let netns: Vec<_> = (0..5).map(|_| Netns::new()).collect();
    let dataplane = Dataplane::start();
    let mut agent = dataplane.agent("n");
    let round = |agent: &mut Client, drain: bool| {
        for (number, netns) in netns.iter().enumerate() {
            agent.add(&format!("p{number}"), "web", netns, false);
        }
        let observer = Client::observer(&dataplane.socket);
        for number in 0..netns.len() {
            let remove = pb::RemovePod {
                uid: format!("p{number}"),
                drain,
                deadline_ms: 1000,
            };
            done(agent.ask(Ask::RemovePod(remove)));
        }
        drop(observer);
    };
    round(&mut agent, false);
    eventually("the first round is over", || agent.pods().is_empty());
    let before = dataplane.open_files();
    for drain in [false, true, false, true] {
        round(&mut agent, drain);
    }
    eventually("descriptors are back where they were", || {
        agent.pods().is_empty() && dataplane.open_files() <= before
    });
}
