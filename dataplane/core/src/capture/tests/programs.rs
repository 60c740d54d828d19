//! How large the programs are, and what proving them costs the kernel.

use std::io::Write;

use super::super::objects::{HOOKS, Objects};
use super::Node;

/// Instructions, and those that the verifier walked: twice what they were when this was written
/// (kernel 6.18). Who needs more says why in review.
const BUDGETS: [(&str, u32, u32); 17] = [
    ("egress", 700, 4900),
    ("sock_create", 650, 700),
    ("getsockopt", 450, 450),
    ("sockops_dataplane", 550, 1250),
    ("sockops_pods", 700, 900),
    ("getpeername4", 100, 50),
    ("getpeername6", 100, 100),
    ("getsockname4", 100, 100),
    ("getsockname6", 200, 200),
    ("recvmsg4", 100, 100),
    ("recvmsg6", 150, 100),
    ("sendmsg4", 700, 700),
    ("sendmsg6", 850, 1300),
    ("connect4", 850, 1450),
    ("connect6", 1000, 3100),
    ("lookup", 900, 1400),
    ("sockops_kubelet", 650, 1000),
];

const INSTRUCTION: u32 = 8;

#[tokio::test]
async fn no_program_grows_beyond_its_budget() {
    let node = Node::new();
    let maps = node.capture.folder.join("maps");
    let mut objects = Objects::new(&maps, &node.capture.ports);
    let mut loaded = vec![("lookup", objects.lookup(0, 0))];
    loaded.push(("sockops_kubelet", objects.kubelet(0)));
    loaded.extend(HOOKS.iter().map(|hook| (hook.program, objects.hook(hook))));
    let mut table = format!(
        "{:18} {:>12} {:>9} {:>9}\n",
        "program", "instructions", "verified", "jited"
    );
    let mut over = Vec::new();
    for (name, program) in loaded {
        let info = program.unwrap_or_else(|error| panic!("{error}")).info();
        let size = info.size_translated().unwrap() / INSTRUCTION;
        let verified = info.verified_instruction_count().unwrap();
        table += &format!(
            "{name:18} {size:12} {verified:9} {:7} B\n",
            info.size_jitted()
        );
        let budget = BUDGETS.iter().find(|(other, ..)| *other == name);
        let &(_, most, most_verified) = budget.unwrap_or_else(|| panic!("{name} has no budget"));
        if size > most || verified > most_verified {
            over.push(name);
        }
    }
    // Past the test harness, which hides what a good test prints.
    std::io::stderr().write_all(table.as_bytes()).unwrap();
    assert!(over.is_empty(), "grown beyond the budget: {over:?}");
}
