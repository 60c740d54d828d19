//! The control socket: the agent's requests, observers, and a successor (design section 5).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

mod agent;
mod answer;
mod build;
mod capture;
mod cgroup;
mod failure;
mod frame;
mod handover;
mod instance;
mod pods;
mod prepare;
mod requests;
mod session;
mod socket;
mod status;
mod streams;

#[cfg(test)]
mod tests;

pub use build::Build;
pub use prepare::{NotReady, prepare};
pub use socket::SocketError;

use instance::Instance;
use socket::ControlSocket;

/// Of the messages in `proto/control.proto`.
pub const VERSION: u32 = 1;

/// How the process was started; everything else comes over the socket.
#[derive(Clone, Debug)]
pub struct Options {
    /// Control socket to create (0600).
    pub socket: PathBuf,
    /// cgroup2 leaf to move into before any socket is opened; created if missing.
    pub cgroup: Option<PathBuf>,
    /// 0: half as many as cores.
    pub workers: usize,
    /// For the dump.
    pub build: Build,
}

/// Runs until SIGTERM's drain or a Drain request with `exit` is done. The second signal cuts.
/// Nothing is logged before an agent sent the log settings; what fails before is returned.
pub async fn run(options: Options) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut stop = Stop::new()?;
    let socket = ControlSocket::bind(&options.socket)?;
    let file = socket.file();
    let instance = Instance::new(options.cgroup.as_deref(), options.build, true);
    let server = tokio::spawn(socket.serve(instance.clone()));
    tokio::select! {
        () = stop.signalled() => drain(&instance, &mut stop).await,
        () = instance.exit.notified() => {}
    }
    file.remove();
    server.abort();
    if let Some(node) = instance.node() {
        tracing::info!("data plane ends");
        let telemetry = node.shared.telemetry.clone();
        telemetry.flush_export(Duration::from_secs(1)).await;
        let flush = move || telemetry.flush_log(Duration::from_secs(1));
        let _ = tokio::task::spawn_blocking(flush).await;
    }
    Ok(())
}

async fn drain(instance: &Arc<Instance>, stop: &mut Stop) {
    let Some(node) = instance.node() else { return };
    let deadline = node.shared.limits.load().drain_deadline;
    tracing::info!(?deadline, "draining: signal received");
    tokio::select! {
        () = node.pods.drain_all(deadline) => {}
        () = stop.signalled() => tracing::warn!("second signal: connections are cut"),
    }
}

/// SIGTERM and SIGINT; SIGHUP is swallowed, because the terminal or session that it speaks of is
/// the agent's.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
    _hangup: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            _hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn signalled(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
