//! The accept loop that all listeners share.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use rustix::io::Errno;
use rustix::net::sockopt::socket_acceptconn;
use rustix::net::{connect_unspec, listen};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::canonical_addr;
use crate::inpod::BACKLOG;

/// While the process has no descriptor or memory left, trying again at once only burns a core.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A process in the pod may destroy our listener again and again: no more often than this it
/// listens again, is counted and told.
const REVIVAL_INTERVAL: Duration = Duration::from_secs(1);

/// A listener that stopped to listen by nobody's wish; `text` says what came of it.
#[derive(Debug)]
pub struct Loss {
    pub port: u16,
    pub text: String,
}

/// Where the loops of one pod tell what becomes of their listeners.
#[derive(Clone)]
pub struct Fate {
    pub accept_errors: Counter,
    pub lost: Counter,
    /// Nobody waits for it to take more: what is too much is only counted.
    pub losses: mpsc::Sender<Loss>,
}

/// Accepts until told to stop; then the listening descriptor is closed, after what had arrived before.
/// `each` must not block: it spawns.
pub async fn accept_loop(
    mut listener: TcpListener,
    stop: watch::Receiver<bool>,
    fate: Fate,
    each: impl Fn(TcpStream, SocketAddr) + Sync,
) {
    let mut told = stop.clone();
    tokio::select! {
        biased;
        // An error means that the pod is gone.
        _ = told.wait_for(|stop| *stop) => {}
        () = accept_for_ever(&mut listener, fate, &each) => {}
    }
    take_rest(listener, each);
}

async fn accept_for_ever(
    listener: &mut TcpListener,
    fate: Fate,
    each: &(impl Fn(TcpStream, SocketAddr) + Sync),
) {
    let port = listener.local_addr().map_or(0, |addr| addr.port());
    let mut pause = FIRST_PAUSE;
    let mut lost = None;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                pause = FIRST_PAUSE;
                // Without it small messages wait; a socket that can't have it is dead already.
                let _ = stream.set_nodelay(true);
                each(stream, canonical_addr(peer));
            }
            Err(_) if !listens(listener) => {
                revive(listener, port, &fate, lost).await;
                lost = Some(Instant::now());
            }
            Err(error) if is_connections_own(&error) => {}
            Err(error) => {
                fate.accept_errors.inc();
                tracing::error!(%error, pause_ms = pause.as_millis() as u64, "can't accept");
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

fn listens(listener: &TcpListener) -> bool {
    socket_acceptconn(listener).unwrap_or(false)
}

/// SOCK_DESTROY, which root in the pod may use on every socket of its namespace (`ss -K`), ends the
/// listening but leaves the socket its port. Returns once it listens again.
async fn revive(listener: &mut TcpListener, port: u16, fate: &Fate, before: Option<Instant>) {
    if let Some(before) = before {
        sleep_until(before + REVIVAL_INTERVAL).await;
    }
    fate.lost.inc();
    let mut result = listen_again(listener);
    let text = match &result {
        Ok(()) => "somebody in the pod ended it; it listens again".to_owned(),
        Err(error) => format!("somebody in the pod ended it, and it can't listen again: {error}"),
    };
    tracing::error!(port, text, "listener lost");
    let _ = fate.losses.try_send(Loss { port, text });
    while result.is_err() {
        sleep(REVIVAL_INTERVAL).await;
        result = listen_again(listener);
        if result.is_ok() {
            tracing::info!(port, "listens again");
        }
    }
}

/// The same socket, so that second descriptors of it listen again, too. What its end left there is
/// cleared first, or each connection accepted would begin at its end (tcp_disconnect in the kernel);
/// and it is registered anew, since for the runtime a socket that hung up stays so.
fn listen_again(listener: &mut TcpListener) -> io::Result<()> {
    connect_unspec(&*listener)?;
    listen(&*listener, BACKLOG)?;
    let same = listener.as_fd().try_clone_to_owned()?;
    *listener = TcpListener::from_std(same.into())?;
    Ok(())
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
