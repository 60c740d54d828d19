//! The process: reads its command line, prepares itself, and runs the data plane.

use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use underpass_core::control::{self, Build, NotReady, Options, SocketError};
use underpass_core::prove;

mod capture;
mod heap;

/// Moves the bytes of a node's pods. Driven over its control socket by `underpass agent`.
#[derive(Parser)]
#[command(name = "underpass-dataplane", version)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    /// Control socket to create (mode 0600)
    #[arg(long, env = "UNDERPASS_DATAPLANE_SOCKET", value_name = "PATH")]
    socket: Option<std::path::PathBuf>,

    /// cgroup2 leaf for this process alone; created if missing
    #[arg(long, env = "UNDERPASS_DATAPLANE_CGROUP", value_name = "PATH")]
    cgroup: Option<std::path::PathBuf>,

    /// Worker threads; 0 is half as many as cores
    #[arg(
        long,
        env = "UNDERPASS_DATAPLANE_WORKERS",
        value_name = "N",
        default_value_t = 0
    )]
    workers: usize,
}

#[derive(Subcommand)]
enum Command {
    /// Prints the version
    Version,
    /// Makes the connections that prove pods captured; asked by the agent on standard input
    Prove {
        /// cgroup2 folder to move into first
        #[arg(long, value_name = "PATH")]
        cgroup: Option<std::path::PathBuf>,
    },
    /// Capture by eBPF as the kernel has it
    #[command(subcommand)]
    Capture(capture::Capture),
}

const BUILD: Build = Build {
    revision: env!("UNDERPASS_BUILD_REVISION"),
    rust: env!("UNDERPASS_BUILD_RUST"),
    profile: env!("UNDERPASS_BUILD_PROFILE"),
    status: env!("UNDERPASS_BUILD_STATUS"),
};

/// sysexits.h, so that a supervisor can tell what asking again may help.
mod exit {
    pub const USAGE: u8 = 64;
    /// A capability, the cgroup or what else the node needs is missing.
    pub const UNAVAILABLE: u8 = 69;
    pub const SOFTWARE: u8 = 70;
    /// The socket can't be created.
    pub const CANNOT_CREATE: u8 = 73;
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(exit::USAGE),
            };
        }
    };
    match arguments.command {
        Some(Command::Version) => {
            println!("underpass-dataplane {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some(Command::Prove { cgroup }) => {
            return match prove::run(cgroup.as_deref()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(exit::UNAVAILABLE, &error.to_string()),
            };
        }
        Some(Command::Capture(command)) => return capture::run(command),
        None => {}
    }
    let Some(socket) = arguments.socket else {
        return fail(
            exit::USAGE,
            "name the control socket: --socket PATH or UNDERPASS_DATAPLANE_SOCKET",
        );
    };
    let options = Options {
        socket,
        cgroup: arguments.cgroup,
        workers: arguments.workers,
        build: BUILD,
    };
    if let Err(error) = control::prepare(&options) {
        return fail(not_ready(&error), &error.to_string());
    }
    run(options)
}

fn run(options: Options) -> ExitCode {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(workers(options.workers));
    let runtime = match builder.enable_all().thread_name("underpass").build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(exit::SOFTWARE, &format!("no worker threads: {error}")),
    };
    let result = runtime.block_on(control::run(options));
    // Whoever still runs has nothing left to do: connections were drained or cut.
    runtime.shutdown_timeout(Duration::from_millis(100));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<SocketError>() => fail(exit::CANNOT_CREATE, &error.to_string()),
        Err(error) => fail(exit::SOFTWARE, &error.to_string()),
    }
}

/// Pods need the other half. A worker more than can run at once costs a fifth of a request in
/// switches between threads.
fn workers(wanted: usize) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    match wanted {
        0 => (cores() / 2).max(1),
        _ => wanted,
    }
}

fn not_ready(error: &NotReady) -> u8 {
    match error {
        NotReady::Cgroup(_) | NotReady::Ability(_) => exit::UNAVAILABLE,
        NotReady::CoreDumps(_) => exit::SOFTWARE,
    }
}

fn fail(code: u8, text: &str) -> ExitCode {
    use std::io::Write;
    // Nobody may be listening to standard error.
    let _ = writeln!(std::io::stderr(), "underpass-dataplane: {text}");
    ExitCode::from(code)
}
