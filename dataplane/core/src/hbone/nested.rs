//! The second tunnel of double HBONE (facts ztunnel 2.5): TLS, HTTP/2 and one CONNECT inside a
//! stream that leads to another network's gateway. Never shared, or all connections would end at
//! the one endpoint that the gateway chose for the first.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::FutureExt;
use h2::client::{Connection, SendRequest};
use http::StatusCode;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::client::request;
use super::gather::Gather;
use super::keepalive::{Beat, Heard, Keepalive};
use super::server::text;
use super::settings::Http2;
use super::stream::Why;
use super::{Connect, Connected, Error, Stream};
use crate::config::Limits;
use crate::identity::Identity;
use crate::tls::{Change, Credentials, Peer, Proof};

/// Who may answer at the far end, and how long that may take.
pub struct Nested<'a> {
    pub expected: &'a Arc<[Identity]>,
    pub credentials: &'a Credentials,
    /// For error texts: the gateway.
    pub via: SocketAddr,
    pub limits: Arc<Limits>,
    pub http2: &'a Http2,
    /// Set when everything must end.
    pub cut: watch::Receiver<bool>,
}

type Driver = Connection<TlsStream<Outer>, Bytes>;

/// The stream to the gateway, which tells when something came over it.
struct Outer {
    stream: Stream,
    heard: Heard,
}

impl Nested<'_> {
    /// The inner stream; `outer` ends with it.
    pub async fn connect(self, outer: Stream, connect: &Connect) -> Result<Connected, Error> {
        let via = self.via;
        let limit = self.limits.tls_handshake_timeout;
        let heard = Heard::default();
        let outer = Outer {
            stream: outer,
            heard: heard.clone(),
        };
        let handshakes = Box::pin(self.handshakes(outer));
        let (peer, send, mut connection) = match timeout(limit, handshakes).await {
            Ok(result) => result?,
            Err(_) => return Err(Error::Timeout(via, "inner TLS handshake", limit)),
        };
        let pings = connection
            .ping_pong()
            .ok_or_else(|| Error::Http2(via, "PINGs are taken".to_owned()))?;
        let (interval, silence) = (self.http2.ping_interval, self.http2.ping_timeout);
        let keepalive = Keepalive::new(pings, heard, interval, silence);
        let why = Why::default();
        let proof = peer.tracked.proof().clone();
        let identity = peer.identity.clone();
        tokio::spawn(drive(connection, keepalive, peer, why.clone(), self.cut));
        let limit = self.limits.connect_answer_timeout;
        match timeout(limit, exchange(send, connect, identity, proof, why)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout(via, "inner CONNECT", limit)),
        }
    }

    async fn handshakes(&self, outer: Outer) -> Result<(Peer, SendRequest<Bytes>, Driver), Error> {
        let via = self.via;
        let config = self.credentials.client(self.expected);
        let config = config.map_err(|err| Error::Tls(via, err.to_string()))?;
        // Not sent and not checked: identities count, not names.
        let mut tls = TlsConnector::from(config)
            .connect(ServerName::from(via.ip()), outer)
            .await
            .map_err(|err| Error::tls(via, &err))?;
        let admission = self.credentials.admit_servers(self.expected);
        let peer = admission.admit(tls.get_ref().1, via);
        let peer = peer.map_err(|distrust| Error::Untrusted(via, distrust))?;
        tls.get_mut()
            .1
            .set_buffer_limit(Some(self.http2.tls_buffer()));
        let (send, connection) = self
            .http2
            .client(1)
            .handshake::<_, Bytes>(tls)
            .await
            .map_err(|err| broken(via, &err))?;
        Ok((peer, send, connection))
    }
}

impl AsyncRead for Outer {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.heard.store(true, Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Outer {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

async fn exchange(
    send: SendRequest<Bytes>,
    connect: &Connect,
    peer: Identity,
    proof: Arc<Proof>,
    why: Why,
) -> Result<Connected, Error> {
    let via = proof.addr;
    let request = request(connect).map_err(|err| Error::Http2(via, format!("authority: {err}")))?;
    let mut send = send.ready().await.map_err(|err| broken(via, &err))?;
    let (response, body) = send
        .send_request(request, false)
        .map_err(|err| broken(via, &err))?;
    let (parts, recv) = response
        .await
        .map_err(|err| broken(via, &err))?
        .into_parts();
    match parts.status {
        StatusCode::OK => Ok(Connected {
            stream: Stream::new(body, recv, None, Some(why), proof),
            peer,
            headers: parts.headers,
        }),
        status => Err(Error::Status(status.as_u16())),
    }
}

/// Until its one stream has ended, the peer is dead or trusted no longer, or everything is cut.
async fn drive(
    mut connection: Driver,
    mut keepalive: Keepalive,
    peer: Peer,
    why: Why,
    mut cut: watch::Receiver<bool>,
) {
    let via = peer.tracked.proof().addr;
    let mut gather = Gather::default();
    loop {
        tokio::select! {
            biased;
            ended = poll_fn(|cx| gather.poll(cx, |cx| connection.poll_unpin(cx))) => {
                if let Err(err) = ended {
                    tracing::debug!(error = text(&err), %via, "inner tunnel ended");
                }
                return;
            }
            beat = poll_fn(|cx| keepalive.poll(cx)) => if let Beat::Dead(silence) = beat {
                // Set once: a tunnel ends once.
                let _ = why.set(Error::Timeout(via, "inner PING", silence));
                return tracing::debug!(%via, "inner tunnel ended: PING not answered");
            },
            _ = cut.wait_for(|cut| *cut) => return,
            change = peer.tracked.changed() => match change {
                // It takes no second stream anyway.
                Change::Drain => {}
                Change::Cut(distrust) => {
                    return tracing::debug!(%distrust, %via, "inner tunnel ended");
                }
            },
        }
    }
}

fn broken(via: SocketAddr, err: &h2::Error) -> Error {
    match err.get_io().map(std::io::Error::kind) {
        Some(std::io::ErrorKind::InvalidData) => {
            Error::Tls(via, format!("inner tunnel: {}", text(err)))
        }
        _ => Error::Http2(via, format!("inner tunnel: {}", text(err))),
    }
}
