//! The accept loop that all listeners share.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::config::canonical_addr;
use crate::inpod::BACKLOG;

/// While the process has no descriptor or memory left, trying again at once only burns a core.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Accepts until told to stop; then the listening descriptor is closed, after what had arrived before.
/// `each` must not block: it spawns.
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
            _ = stop.wait_for(|stop| *stop) => return take_rest(listener, each),
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
                    _ = stop.wait_for(|stop| *stop) => return take_rest(listener, each),
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// The kernel has established these already: closing under them would reset them.
fn take_rest(listener: TcpListener, each: impl Fn(TcpStream, SocketAddr)) {
    let Ok(listener) = listener.into_std() else {
        return;
    };
    // No more than the queue holds: where others listen on this socket, it fills without end.
    for _ in 0..BACKLOG {
        let Ok((stream, peer)) = listener.accept() else {
            return;
        };
        let registered = stream
            .set_nonblocking(true)
            .and_then(|()| TcpStream::from_std(stream));
        if let Ok(stream) = registered {
            let _ = stream.set_nodelay(true);
            each(stream, canonical_addr(peer));
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
