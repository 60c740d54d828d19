//! SOCKS5 for applications that ask for it (RFC 1928, facts ztunnel 4.2): CONNECT, no
//! authentication. Beyond upstream, success is told once the connection stands.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::attempt::Upstream;
use super::authority::LONGEST_NAME;
use super::connection::Direction;
use super::error::Early;
use super::outbound::{Unserved, Wanted, establish};
use super::pod::{Pod, run};
use crate::config::{canonical, canonical_addr};
use crate::state::resolve::IpFamily;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;

/// The codes that upstream uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Reply {
    Succeeded = 0,
    Failed = 1,
    HostUnreachable = 4,
    NotSupported = 7,
}

/// What a client asked for.
enum Host {
    Ip(IpAddr),
    Name(String),
}

#[derive(Debug, thiserror::Error)]
pub enum BadRequest {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("SOCKS version {0} instead of 5")]
    Version(u8),
    #[error("the client wants to authenticate itself: say that no authentication is needed")]
    Method,
    #[error("SOCKS command {0}: only CONNECT is served")]
    Command(u8),
    #[error("SOCKS address type {0}, or a host name that is none")]
    Address(u8),
    #[error("the SOCKS request isn't complete after {0:?}")]
    Slow(std::time::Duration),
}

pub async fn handle(pod: Arc<Pod>, mut client: TcpStream, peer: SocketAddr) {
    let wanted = match Box::pin(understand(&pod, &mut client, peer)).await {
        Ok(wanted) => wanted,
        Err((reply, error)) => {
            pod.refuse(Direction::Outbound, peer, None, &error);
            return tell(&mut client, reply).await;
        }
    };
    let established = match Box::pin(establish(&pod, wanted)).await {
        Ok(established) => established,
        Err(Unserved::Refused) => return tell(&mut client, Reply::Failed).await,
        Err(Unserved::Unreachable) => return tell(&mut client, Reply::HostUnreachable).await,
    };
    tell(&mut client, Reply::Succeeded).await;
    let (open, _place) = (established.open, established.place);
    let result = match established.upstream {
        Upstream::Tcp(server, _socket) => run(&open.connection, client, server).await,
        Upstream::Tunnel(server) => run(&open.connection, client, server).await,
    };
    open.end(result);
}

async fn understand(
    pod: &Pod,
    client: &mut TcpStream,
    peer: SocketAddr,
) -> Result<Wanted, (Reply, Early)> {
    let began = Instant::now();
    let local = client.local_addr().map(canonical_addr);
    let local = local.map_err(|error| (Reply::Failed, error.into()))?;
    // As long as a peer may take to say who it is.
    let patience = pod.limits().tls_handshake_timeout;
    let asked = timeout(patience, request(client)).await;
    let asked = asked.unwrap_or(Err(BadRequest::Slow(patience)));
    let (host, port) = asked.map_err(|error| {
        let reply = match error {
            BadRequest::Io(_) | BadRequest::Slow(_) => Reply::Failed,
            _ => Reply::NotSupported,
        };
        (reply, Early::Socks(error))
    })?;
    let ip = match host {
        Host::Ip(ip) => canonical(ip),
        Host::Name(name) => {
            let found = resolve(pod, &name).await;
            found.map_err(|error| (Reply::HostUnreachable, error))?
        }
    };
    Ok(Wanted {
        peer,
        local,
        dst: SocketAddr::new(ip, port),
        began,
    })
}

/// Reads no byte beyond the request: what follows is the application's.
async fn request(client: &mut TcpStream) -> Result<(Host, u16), BadRequest> {
    let version = client.read_u8().await?;
    if version != VERSION {
        return Err(BadRequest::Version(version));
    }
    let mut methods = vec![0; client.read_u8().await?.into()];
    client.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        client.write_all(&[VERSION, NO_METHOD]).await?;
        return Err(BadRequest::Method);
    }
    client.write_all(&[VERSION, NO_AUTHENTICATION]).await?;

    let mut head = [0; 4];
    client.read_exact(&mut head).await?;
    let [version, command, _, kind] = head;
    match (version, command) {
        (VERSION, CONNECT) => {}
        (VERSION, command) => return Err(BadRequest::Command(command)),
        (version, _) => return Err(BadRequest::Version(version)),
    }
    let host = match kind {
        1 => {
            let mut octets = [0; 4];
            client.read_exact(&mut octets).await?;
            Host::Ip(Ipv4Addr::from(octets).into())
        }
        3 => {
            let mut name = vec![0; client.read_u8().await?.into()];
            client.read_exact(&mut name).await?;
            Host::Name(hostname(name).ok_or(BadRequest::Address(kind))?)
        }
        4 => {
            let mut octets = [0; 16];
            client.read_exact(&mut octets).await?;
            Host::Ip(Ipv6Addr::from(octets).into())
        }
        _ => return Err(BadRequest::Address(kind)),
    };
    Ok((host, client.read_u16().await?))
}

fn hostname(name: Vec<u8>) -> Option<String> {
    let known = |b: &u8| b.is_ascii_alphanumeric() || b"-._".contains(b);
    let fits = (1..=LONGEST_NAME).contains(&name.len()) && name.iter().all(known);
    String::from_utf8(name).ok().filter(|_| fits)
}

/// A service's own address, else what the node's nameservers say; IPv4 first, as the client came.
async fn resolve(pod: &Pod, name: &str) -> Result<IpAddr, Early> {
    let shared = &pod.shared;
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Ok(canonical(ip));
    }
    let host = name.trim_end_matches('.');
    let snapshot = shared.store.snapshot();
    let service = snapshot.service_by_hostname(host, Some(&pod.info.namespace));
    let network = &*shared.config.network;
    let vip = service.and_then(|service| {
        let ours = service.vips.iter().filter(|(of, _)| **of == *network);
        ours.map(|(_, ip)| *ip).min_by_key(IpAddr::is_ipv6)
    });
    if let Some(vip) = vip {
        return Ok(vip);
    }
    let patience = pod.limits().connect_timeout;
    Ok(shared.names.lookup(host, IpFamily::V4, patience).await?)
}

async fn tell(client: &mut TcpStream, reply: Reply) {
    let answer = [VERSION, reply as u8, 0, 1, 0, 0, 0, 0, 0, 0];
    // A client that is gone shows at the first byte that is copied.
    let _ = client.write_all(&answer).await;
}
