//! A process that has no descriptor left.

mod node;

use std::net::TcpStream;
use std::time::Instant;

use node::eventually;
use node::netns::Netns;
use node::process::Dataplane;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

/// Of user and system together, in hundredths of a second.
fn cpu(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let (_, fields) = stat.rsplit_once(')').expect("the name is in parentheses");
    let fields: Vec<_> = fields.split_whitespace().collect();
    // proc(5): utime and stime are fields 14 and 15, the name is 2.
    let field = |number: usize| fields[number - 3].parse::<u64>().expect("a number");
    field(14) + field(15)
}

#[test]
fn without_descriptors_it_waits_instead_of_spinning_and_recovers() {
    let netns = Netns::new();
    let dataplane = Dataplane::start();
    let mut agent = dataplane.agent("n");
    agent.add("p", "web", &netns, false);
    let allow = |files: usize| {
        let pid = Pid::from_raw(dataplane.pid() as i32).expect("not 0");
        let limit = Rlimit {
            current: Some(files as u64),
            // Lowering it couldn't be undone.
            maximum: getrlimit(Resource::Nofile).maximum,
        };
        prlimit(Some(pid), Resource::Nofile, limit).expect("tests run as root");
    };
    let before = dataplane.open_files();
    allow(before + 4);
    let clients = netns.run(|| {
        let dial = |_| TcpStream::connect("127.0.0.1:15008").expect("queued by the kernel");
        (0..40).map(dial).collect::<Vec<_>>()
    });
    let errors = |text: String| {
        let line = text
            .lines()
            .find(|l| l.starts_with("underpass_accept_errors_total"));
        let count = line.and_then(|l| l.rsplit(' ').next()?.parse::<u64>().ok());
        count.expect("the counter is there")
    };
    eventually("it has none left", || errors(agent.metrics()) > 0);

    // Six more attempts, however long they take: a loop that spins makes them at once.
    let (used, failed, begun) = (
        cpu(dataplane.pid()),
        errors(agent.metrics()),
        Instant::now(),
    );
    eventually("it goes on trying", || {
        errors(agent.metrics()) >= failed + 6
    });
    let (attempts, waited) = (errors(agent.metrics()) - failed, begun.elapsed());
    let a_second = attempts as f64 / waited.as_secs_f64();
    assert!(a_second < 15.0, "{attempts} attempts in {waited:?}");
    let used = (cpu(dataplane.pid()) - used) as f64 / 100.0;
    assert!(
        used < waited.as_secs_f64() / 4.0,
        "{used} s of CPU in {waited:?}"
    );

    allow(before + 1000);
    // Those in the queue are served: told that the pod has no record, and let go.
    eventually("the queue is worked off", || {
        let seen = agent.metrics();
        let refused = seen
            .lines()
            .filter(|l| l.starts_with("underpass_refusals_total{"));
        let count = refused.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok());
        count.sum::<u64>() == 40
    });
    drop(clients);
    eventually("nothing is left", || dataplane.open_files() <= before);
}
