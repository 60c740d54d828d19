//! Socket options of the data plane's sockets (facts ztunnel 1.2), and whether this process may set
//! them at all.
#![allow(unsafe_code)] // one option that no library wraps

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use super::Netns;

#[derive(Debug, thiserror::Error)]
#[error("{what} is not permitted ({source}): the data plane needs {needs}")]
pub struct MissingAbility {
    what: &'static str,
    needs: &'static str,
    source: io::Error,
}

/// Tries at start what every pod will need, so that a missing capability shows before a pod fails.
pub(crate) fn check_abilities() -> Result<(), MissingAbility> {
    let missing = |what, needs| {
        move |source| MissingAbility {
            what,
            needs,
            source,
        }
    };
    let socket = Netns::own()
        .map_err(io::Error::other)
        .and_then(|own| own.enter(|| tcp(Domain::IPV4))?)
        .map_err(missing("entering a network namespace", "CAP_SYS_ADMIN"))?;
    socket
        .set_mark(1)
        .map_err(missing("SO_MARK", "CAP_NET_ADMIN"))?;
    socket
        .set_ip_transparent_v4(true)
        .map_err(missing("IP_TRANSPARENT", "CAP_NET_ADMIN (or CAP_NET_RAW)"))
}

/// Non-blocking, close on exec. Belongs to the namespace that the thread is in.
pub(super) fn tcp(domain: Domain) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    Socket::new(domain, kind, Some(Protocol::TCP))
}

/// facts ztunnel 1.2: idle 180 s, interval 180 s, 9 retries.
pub(super) fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(Duration::from_secs(180))
        .with_interval(Duration::from_secs(180))
        .with_retries(9)
}

/// The port is chosen at connect, where only the whole 4-tuple must be free: at bind, one client
/// address would have no more than the ephemeral range for all applications together.
pub(super) fn bind_address_no_port(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: `on` lives through the call and the length given is its own; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
