//! Questions that aren't ours, on their way to the pod's nameservers: the client's own bytes with an
//! id and a port of ours, and the answer's bytes back (facts ztunnel 9.4, and what upstream loses).
//!
//! A nameserver that is silent for a while doesn't hold the question up: the next one is asked as
//! well, and the first good answer counts.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::wire::{self, Query};
use crate::config::Config;
use crate::inpod::{Netns, Share};
use crate::telemetry::DnsMetrics;

/// As many as a libc would ask.
const MOST_SERVERS: usize = 3;
/// Into how many parts the time for one question is cut; after one of them the next server is asked
/// (or the only one again: a datagram may be lost).
const PATIENCE: u32 = 5;
/// A server that didn't answer is asked after the others for so long.
const AVOIDED: Duration = Duration::from_secs(30);

/// The nameservers of one pod, and which of them failed lately.
#[derive(Debug, Default)]
pub struct Nameservers {
    servers: Vec<SocketAddr>,
    failed: Mutex<Vec<(SocketAddr, Instant)>>,
}

/// What a question needs on its way.
pub struct Way<'a> {
    pub netns: &'a Arc<Netns>,
    pub config: &'a Config,
    /// Of the pod.
    pub sockets: &'a Arc<Share>,
    pub metrics: &'a DnsMetrics,
    /// The client came by TCP: it is told nothing truncated.
    pub tcp: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    #[error("no nameserver is known for this pod")]
    NoServers,
    #[error("nameserver {0}: no answer within {1:?}")]
    Silent(SocketAddr, Duration),
    #[error("nameserver {0}: {1}")]
    Io(SocketAddr, io::Error),
}

impl Nameservers {
    pub fn new(mut servers: Vec<SocketAddr>) -> Self {
        servers.truncate(MOST_SERVERS);
        Self {
            servers,
            failed: Mutex::default(),
        }
    }

    /// The answer's bytes with the client's id. SERVFAIL and REFUSED of one server count only when
    /// no other answers better.
    pub async fn ask(
        &self,
        way: &Way<'_>,
        packet: &[u8],
        query: &Query,
    ) -> Result<Vec<u8>, Unanswered> {
        let order = self.order(Instant::now());
        let pause = way.config.dns.forward_timeout / PATIENCE;
        let (mut left, mut asked) = (order.into_iter(), FuturesUnordered::new());
        let (mut poor, mut error) = (None, Unanswered::NoServers);
        loop {
            if let Some(server) = left.next() {
                asked.push(self.attempt(way, server, packet, query));
            }
            let next = async {
                tokio::select! {
                    result = asked.next() => Some(result),
                    () = tokio::time::sleep(pause), if left.len() > 0 => None,
                }
            };
            match next.await {
                // Time for the next server, if there is one.
                None => {}
                Some(Some(Ok(answer))) if matches!(wire::rcode(&answer), 2 | 5) => {
                    poor.get_or_insert(answer);
                }
                Some(Some(Ok(answer))) => return Ok(answer),
                Some(Some(Err(failed))) => error = failed,
                Some(None) => return poor.ok_or(error),
            }
        }
    }

    /// Those that failed lately come last; a single one is asked twice.
    fn order(&self, now: Instant) -> Vec<SocketAddr> {
        let mut failed = self.failed.lock();
        failed.retain(|(_, since)| now.saturating_duration_since(*since) < AVOIDED);
        let mut order = self.servers.clone();
        order.sort_by_key(|server| failed.iter().any(|(known, _)| known == server));
        if let [only] = order[..] {
            order.push(only);
        }
        order
    }

    async fn attempt(
        &self,
        way: &Way<'_>,
        server: SocketAddr,
        packet: &[u8],
        query: &Query,
    ) -> Result<Vec<u8>, Unanswered> {
        let patience = way.config.dns.forward_timeout;
        let result = timeout(patience, exchange(way, server, packet, query)).await;
        let mut failed = self.failed.lock();
        failed.retain(|(known, _)| *known != server);
        let error = match result {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => Unanswered::Io(server, error),
            Err(_) => Unanswered::Silent(server, patience),
        };
        failed.push((server, Instant::now()));
        Err(error)
    }
}

/// UDP, then TCP where the answer didn't fit and the client can take more.
async fn exchange(
    way: &Way<'_>,
    server: SocketAddr,
    packet: &[u8],
    query: &Query,
) -> io::Result<Vec<u8>> {
    let _held = way.sockets.take(1).map_err(io::Error::other)?;
    let mut sent = packet.to_vec();
    wire::set_id(&mut sent, rand::random());
    let mut answer = over_udp(way, server, &sent, query).await?;
    if way.tcp && wire::is_truncated(&answer) {
        answer = over_tcp(way, server, &sent, query).await?;
    }
    wire::set_id(&mut answer, query.id);
    Ok(answer)
}

async fn over_udp(
    way: &Way<'_>,
    server: SocketAddr,
    sent: &[u8],
    query: &Query,
) -> io::Result<Vec<u8>> {
    let socket = way.netns.dns_upstream(way.config, server).await?;
    socket.send(sent).await?;
    loop {
        let mut answer = Vec::with_capacity(query.payload());
        socket.recv_buf(&mut answer).await?;
        if wire::answers(sent, query, &answer) {
            return Ok(answer);
        }
        // Somebody guesses, or it is late: the right one may still come.
        way.metrics.foreign_answers.inc();
    }
}

async fn over_tcp(
    way: &Way<'_>,
    server: SocketAddr,
    sent: &[u8],
    query: &Query,
) -> io::Result<Vec<u8>> {
    let mut stream = way.netns.connect(way.config, server, None).await?;
    let length = u16::try_from(sent.len()).map_err(io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes(), sent].concat())
        .await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await?;
    if wire::answers(sent, query, &answer) {
        return Ok(answer);
    }
    way.metrics.foreign_answers.inc();
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "it answered another question",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_failed_come_last_for_a_while() {
        let servers: Vec<SocketAddr> = ["10.0.0.1:53", "10.0.0.2:53", "10.0.0.3:53", "10.0.0.4:53"]
            .map(|addr| addr.parse().unwrap())
            .into();
        let nameservers = Nameservers::new(servers.clone());
        let now = Instant::now();
        assert_eq!(nameservers.order(now), servers[..3]);
        nameservers.failed.lock().push((servers[0], now));
        assert_eq!(nameservers.order(now), [servers[1], servers[2], servers[0]]);
        assert_eq!(nameservers.order(now + AVOIDED), servers[..3]);
        assert_eq!(nameservers.failed.lock().len(), 0);
    }

    #[test]
    fn a_single_server_is_asked_again() {
        let server = "10.0.0.1:53".parse().unwrap();
        assert_eq!(
            Nameservers::new(vec![server]).order(Instant::now()),
            [server; 2]
        );
    }
}
