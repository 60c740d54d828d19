//! The pod's DNS sockets: datagrams, and connections with one message after another.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::time::timeout;

use super::resolver::{Resolver, Transport};
use crate::proxy::Tasks;

/// Larger queries are cut by the kernel and so refused as malformed; real ones have a few hundred
/// bytes.
const LARGEST_QUERY: usize = 4096;
/// facts ztunnel 9.1
const IDLE: Duration = Duration::from_secs(5);
/// Between failures of the socket itself.
const PAUSE: Duration = Duration::from_millis(10);

/// Answers until told to stop, then closes our descriptor. Questions that wait do so as `tasks`.
pub async fn udp(
    resolver: Arc<Resolver>,
    tasks: Arc<Tasks>,
    socket: UdpSocket,
    mut stop: watch::Receiver<bool>,
) {
    let socket = Arc::new(socket);
    let mut packet = vec![0; LARGEST_QUERY];
    loop {
        let received = tokio::select! {
            biased;
            // An error means that the pod is gone.
            _ = stop.wait_for(|stop| *stop) => return,
            received = socket.recv_from(&mut packet) => received,
        };
        match received {
            Ok((length, client)) => datagram(&resolver, &tasks, &socket, &packet[..length], client),
            Err(error) => {
                tracing::debug!(%error, "can't receive DNS questions");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn datagram(
    resolver: &Arc<Resolver>,
    tasks: &Tasks,
    socket: &Arc<UdpSocket>,
    packet: &[u8],
    client: SocketAddr,
) {
    let later = match resolver.now(packet, Transport::Udp) {
        Ok(answer) => return send(socket, &answer, client),
        Err(None) => return,
        Err(Some(later)) => later,
    };
    let Ok(permit) = resolver.pending.clone().try_acquire_owned() else {
        return send(socket, &resolver.overloaded(&later), client);
    };
    let (resolver, socket) = (resolver.clone(), socket.clone());
    let packet: Box<[u8]> = packet.into();
    tasks.spawn(async move {
        let _permit = permit;
        send(&socket, &resolver.later(&packet, later).await, client);
    });
}

/// A client whose buffer is full asks again.
fn send(socket: &UdpSocket, answer: &[u8], client: SocketAddr) {
    if let Err(error) = socket.try_send_to(answer, client) {
        tracing::debug!(%error, %client, "a DNS answer is lost");
    }
}

/// One connection, until its client is silent for a while or closes it.
pub async fn tcp(resolver: Arc<Resolver>, stream: TcpStream) {
    let Some(_admitted) = resolver.admit() else {
        return;
    };
    // The client sees how it ended.
    let _ = messages(&resolver, stream).await;
}

async fn messages(resolver: &Resolver, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let length = timeout(IDLE, stream.read_u16()).await??;
        let mut packet = vec![0; length.into()];
        timeout(IDLE, stream.read_exact(&mut packet)).await??;
        let answer = match resolver.now(&packet, Transport::Tcp) {
            Ok(answer) => answer,
            Err(None) => return Ok(()),
            Err(Some(later)) => match resolver.pending.try_acquire() {
                Ok(_permit) => resolver.later(&packet, later).await,
                Err(_) => resolver.overloaded(&later),
            },
        };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let framed = [&length.to_be_bytes(), answer.as_slice()].concat();
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
}
