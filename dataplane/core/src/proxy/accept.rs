//! The accept loop that all listeners share.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::config::canonical_addr;

/// While the process has no descriptor or memory left, trying again at once only burns a core.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Accepts until told to stop; then the listening descriptor is closed. `each` must not block: it
/// spawns.
pub async fn accept_loop(
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
    errors: Counter,
    each: impl Fn(TcpStream, SocketAddr),
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let accepted = tokio::select! {
            biased;
            // An error means that the pod is gone.
            _ = stop.wait_for(|stop| *stop) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = FIRST_PAUSE;
                // Without it small messages wait; a socket that can't have it is dead already.
                let _ = stream.set_nodelay(true);
                each(stream, canonical_addr(peer));
            }
            Err(error) if is_connections_own(&error) => {}
            Err(error) => {
                errors.inc();
                tracing::error!(%error, pause_ms = pause.as_millis() as u64, "can't accept");
                tokio::select! {
                    biased;
                    _ = stop.wait_for(|stop| *stop) => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Errors that belong to the connection that was to be accepted, not to us (accept(2)).
fn is_connections_own(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(
        errno,
        Some(
            Errno::CONNABORTED
                | Errno::PERM
                | Errno::PROTO
                | Errno::NETDOWN
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::OPNOTSUPP
                | Errno::NETUNREACH
        )
    )
}
