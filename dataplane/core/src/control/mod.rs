//! The control socket: the agent's requests, observers, and a successor (design section 5).

use std::path::PathBuf;

/// How the process was started; everything else comes over the socket.
#[derive(Clone, Debug)]
pub struct Options {
    /// Control socket to create (0600).
    pub socket: PathBuf,
    /// cgroup2 leaf to move into before any socket is opened; created if missing.
    pub cgroup: Option<PathBuf>,
    /// 0: one a core.
    pub workers: usize,
}

/// Runs until SIGTERM's drain or a Drain request with `exit` is done. The second signal cuts.
pub async fn run(_options: Options) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    unimplemented!()
}
