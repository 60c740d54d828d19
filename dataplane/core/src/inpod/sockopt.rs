//! Socket options of the data plane's sockets (facts ztunnel 1.2), and whether this process may set
//! them at all.
#![allow(unsafe_code)] // two options that no library wraps

use std::io;
use std::os::fd::AsRawFd;

use socket2::{Domain, Socket, TcpKeepalive, Type};

use super::Netns;
use crate::config::Keepalive;

/// Index of the loopback interface, in every network namespace, whatever its name.
const LOOPBACK: libc::c_int = 1;

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
    new(domain, Type::STREAM)
}

/// Like `tcp`, for datagrams too.
pub(super) fn new(domain: Domain, kind: Type) -> io::Result<Socket> {
    Socket::new(domain, kind.nonblocking().cloexec(), None)
}

/// Peers that vanish must not hold a connection for ever (facts ztunnel 1.2). Accepted sockets
/// inherit both from their listener.
pub(super) fn keepalive(socket: &Socket, wanted: Option<&Keepalive>) -> io::Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    let keepalive = TcpKeepalive::new()
        .with_time(wanted.time)
        .with_interval(wanted.interval)
        .with_retries(wanted.retries);
    socket.set_tcp_keepalive(&keepalive)?;
    if wanted.user_timeout {
        // As long as keepalive would take to find out.
        let limit = wanted.time + wanted.interval * wanted.retries;
        socket.set_tcp_user_timeout(Some(limit))?;
    }
    Ok(())
}

/// The port is chosen at connect, where only the whole 4-tuple must be free: at bind, one client
/// address would have no more than the ephemeral range for all applications together.
pub(super) fn bind_address_no_port(socket: &Socket) -> io::Result<()> {
    set_number(socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// The kernel gives a port in TIME_WAIT out again after a second only where it knows that nothing
/// but loopback was meant (tcp_tw_reuse 2, its default); elsewhere after a minute, by which some 470
/// connections a second from one client to one port of a pod would use up all that there are (seen).
pub(super) fn bind_to_loopback(socket: &Socket) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX, LOOPBACK)
}

fn set_number(socket: &Socket, level: i32, option: i32, number: libc::c_int) -> io::Result<()> {
    // SAFETY: `number` lives through the call and the length given is its own; the descriptor is
    // open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const number).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
