//! `underpass-dataplane capture`: what the kernel says of capture by eBPF, without a running
//! process.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use underpass_core::capture::probe::{self, Asked};

use crate::exit;

#[derive(Subcommand)]
pub enum Capture {
    /// Whether this node can capture by eBPF; tries everything and leaves nothing
    Probe {
        /// cgroup2 folder above all processes of all pods
        #[arg(long, value_name = "PATH")]
        pods_cgroup: PathBuf,

        /// cgroup2 folder for the leaves of this node's data planes
        #[arg(long, value_name = "PATH")]
        leaf_parent: PathBuf,

        /// Where programs will be pinned
        #[arg(
            long,
            value_name = "PATH",
            default_value = "/sys/fs/bpf/underpass/node"
        )]
        folder: PathBuf,

        /// For machines
        #[arg(long)]
        json: bool,
    },
}

/// Success when everything needed is there.
pub fn run(command: Capture) -> ExitCode {
    let Capture::Probe {
        pods_cgroup,
        leaf_parent,
        folder,
        json,
    } = command;
    let found = probe::probe(&Asked {
        pods_cgroup,
        leaf_parent,
        folder,
    });
    if json {
        println!("{}", probe::json(&found));
    } else {
        for one in &found {
            match one.reason.as_str() {
                "" => println!("yes  {}", one.name),
                reason => println!("NO   {}: {reason}; {}", one.name, one.remedy),
            }
        }
    }
    match found.iter().all(|one| one.reason.is_empty()) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(exit::UNAVAILABLE),
    }
}
