//! Where a captured connection was going before it was redirected.

use std::io;
use std::net::SocketAddr;

use rustix::io::Errno;
use rustix::net::sockopt;
use tokio::net::TcpStream;

use crate::config::canonical_addr;

/// SO_ORIGINAL_DST of either family, canonical (facts ztunnel 1.2). An error where nothing was
/// redirected: the connection was made to the listener itself.
pub fn original_dst(stream: &TcpStream) -> io::Result<SocketAddr> {
    let local = canonical_addr(stream.local_addr()?);
    let original: rustix::io::Result<SocketAddr> = if local.is_ipv4() {
        sockopt::ip_original_dst(stream).map(Into::into)
    } else {
        sockopt::ipv6_original_dst(stream).map(Into::into)
    };
    match original.map(canonical_addr) {
        Ok(original) if original == local => Err(not_redirected(local)),
        Ok(original) => Ok(original),
        // Conntrack doesn't know the connection, or isn't there: nothing can have redirected it.
        Err(Errno::NOENT | Errno::NOPROTOOPT) => Err(not_redirected(local)),
        Err(errno) => Err(errno.into()),
    }
}

fn not_redirected(local: SocketAddr) -> io::Error {
    let text = format!("connected straight to the proxy's listener {local}, nothing redirected it");
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
