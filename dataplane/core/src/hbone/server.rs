//! The server's side of a tunnel: handshakes, then CONNECT after CONNECT.

use std::future::poll_fn;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::SystemTime;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{HeaderMap, Method, Response, StatusCode};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::gather::Gather;
use super::keepalive::{Beat, Heard, Keepalive};
use super::settings::Http2;
use super::socket::Socket;
use super::stream::Why;
use super::{Error, Stream, until};
use crate::config::{Limits, canonical_addr};
use crate::identity::Identity;
use crate::tls::{Change, Credentials, Peer, Proof, describe};

/// An inbound CONNECT (or something else that must be refused with a status).
pub struct Request {
    pub method: Method,
    /// As received, unparsed.
    pub authority: Option<String>,
    pub headers: HeaderMap,
}

/// The answer is owed exactly once; dropping it resets the stream.
pub struct Responder {
    respond: SendResponse<Bytes>,
    recv: RecvStream,
    proof: Arc<Proof>,
    why: Why,
}

/// One inbound tunnel after its handshakes.
pub struct Tunnel {
    connection: Connection<TlsStream<Socket>, Bytes>,
    gather: Gather,
    keepalive: Keepalive,
    peer: Peer,
    from: SocketAddr,
    /// Why its streams end with it.
    why: Why,
    expires: SystemTime,
    /// Looks for that moment; None once it came.
    expiry: Option<Pin<Box<Sleep>>>,
    over: bool,
}

impl Responder {
    /// 200 with these headers; the stream is open from now on.
    pub fn accept(mut self, headers: HeaderMap) -> Result<Stream, Error> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let send = self
            .respond
            .send_response(response, false)
            .map_err(|err| Error::Http2(self.proof.addr, err.to_string()))?;
        let why = Some(self.why);
        Ok(Stream::new(send, self.recv, None, why, self.proof))
    }

    /// Status only, end of stream (facts ztunnel 3.3).
    pub fn refuse(mut self, status: u16) {
        let mut response = Response::new(());
        *response.status_mut() =
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // Fails only when the client gave up: nobody is left to be told.
        let _ = self.respond.send_response(response, true);
    }
}

impl Tunnel {
    /// TLS and HTTP/2 handshakes, each within its time limit.
    pub async fn accept(
        tcp: TcpStream,
        credentials: &Credentials,
        limits: &Limits,
        http2: &Http2,
    ) -> Result<Self, Error> {
        let from = tcp
            .peer_addr()
            .map_or_else(|_| (Ipv4Addr::UNSPECIFIED, 0).into(), canonical_addr);
        let heard = Heard::default();
        // The state of handshakes is large and soon over: not in the tunnel's own future.
        let secured = Box::pin(secure(tcp, credentials, http2, from, heard.clone()));
        let limit = limits.tls_handshake_timeout;
        let secured = match tokio::time::timeout(limit, secured).await {
            Ok(result) => result?,
            Err(_) => return Err(Error::Timeout(from, "TLS handshake", limit)),
        };
        let greeted = Box::pin(greet(secured, http2, from, heard));
        let limit = limits.preface_timeout;
        match tokio::time::timeout(limit, greeted).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout(from, "HTTP/2 preface", limit)),
        }
    }

    /// First URI SAN that is a SPIFFE id (facts ztunnel 3.1).
    pub fn peer(&self) -> &Identity {
        &self.peer.identity
    }

    /// The first of both ends' certificates: no request after it proves anything. The peer is told
    /// by a GOAWAY to make a new tunnel.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }

    /// Drives the connection until the next request; None when the tunnel is over. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<(Request, Responder), Error>> {
        loop {
            if let Some(next) = self.step().await {
                return next;
            }
        }
    }

    /// None where there is more to wait for.
    async fn step(&mut self) -> Option<Option<Result<(Request, Responder), Error>>> {
        if self.over {
            return Some(None);
        }
        let from = self.from;
        let accepted = poll_fn(|cx| self.gather.poll(cx, |cx| self.connection.poll_accept(cx)));
        tokio::select! {
            biased;
            request = accepted => Some(match request {
                Some(Ok((request, respond))) => {
                    let proof = self.peer.tracked.proof().clone();
                    Some(Ok(received(request, respond, proof, self.why.clone())))
                }
                Some(Err(err)) => {
                    self.over = true;
                    Some(Err(Error::Http2(from, text(&err))))
                }
                None => {
                    self.over = true;
                    None
                }
            }),
            silence = silence(&mut self.keepalive) => {
                let error = Error::Timeout(from, "PING", silence);
                // Set once: a tunnel ends once.
                let _ = self.why.set(error.clone());
                self.shut().await;
                Some(Some(Err(error)))
            }
            change = self.peer.tracked.changed() => match change {
                Change::Drain => {
                    self.drain();
                    None
                }
                Change::Cut(distrust) => {
                    self.shut().await;
                    Some(Some(Err(Error::Untrusted(from, distrust))))
                }
            },
            () = elapsed(&mut self.expiry) => {
                match self.expires <= SystemTime::now() {
                    true => {
                        self.expiry = None;
                        self.drain();
                    }
                    false => {
                        let next = Instant::now() + until(self.expires);
                        let expiry = self.expiry.as_mut();
                        expiry.into_iter().for_each(|sleep| sleep.as_mut().reset(next));
                    }
                }
                None
            }
        }
    }

    /// GOAWAY, and the end of all streams.
    async fn shut(&mut self) {
        self.over = true;
        self.connection.abrupt_shutdown(Reason::NO_ERROR);
        // One attempt to write: the peer may not read.
        poll_fn(|cx| {
            let _ = self.connection.poll_closed(cx);
            Poll::Ready(())
        })
        .await;
    }

    /// GOAWAY; streams that are open may end. Keep calling `next` until None.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }
}

/// A peer that proved who it is.
struct Secured {
    tls: TlsStream<Socket>,
    peer: Peer,
    expires: SystemTime,
}

async fn secure(
    tcp: TcpStream,
    credentials: &Credentials,
    http2: &Http2,
    from: SocketAddr,
    heard: Heard,
) -> Result<Secured, Error> {
    let mut tls = TlsAcceptor::from(credentials.server.clone())
        .accept(Socket::new(tcp, heard))
        .await
        .map_err(|err| Error::tls(from, &err))?;
    let peer = credentials.admit_clients().admit(tls.get_ref().1, from);
    let peer = peer.map_err(|distrust| Error::Untrusted(from, distrust))?;
    let expires = peer.expires.min(credentials.not_after);
    tls.get_mut().1.set_buffer_limit(Some(http2.tls_buffer()));
    Ok(Secured { tls, peer, expires })
}

async fn greet(
    secured: Secured,
    http2: &Http2,
    from: SocketAddr,
    heard: Heard,
) -> Result<Tunnel, Error> {
    let Secured { tls, peer, expires } = secured;
    let mut connection = http2
        .server()
        .handshake(tls)
        .await
        .map_err(|err| Error::Http2(from, text(&err)))?;
    let pings = connection
        .ping_pong()
        .ok_or_else(|| Error::Http2(from, "PINGs are taken".to_owned()))?;
    Ok(Tunnel {
        connection,
        gather: Gather::default(),
        keepalive: Keepalive::new(pings, heard, http2.ping_interval, http2.ping_timeout),
        peer,
        from,
        why: Why::default(),
        expires,
        expiry: Some(Box::pin(sleep(until(expires)))),
        over: false,
    })
}

fn received(
    request: http::Request<RecvStream>,
    respond: SendResponse<Bytes>,
    proof: Arc<Proof>,
    why: Why,
) -> (Request, Responder) {
    let (parts, recv) = request.into_parts();
    let request = Request {
        method: parts.method,
        authority: parts.uri.authority().map(|a| a.as_str().to_owned()),
        headers: parts.headers,
    };
    let responder = Responder {
        respond,
        recv,
        proof,
        why,
    };
    (request, responder)
}

async fn elapsed(sleep: &mut Option<Pin<Box<Sleep>>>) {
    match sleep {
        Some(sleep) => sleep.await,
        None => std::future::pending().await,
    }
}

/// How long the peer has answered no PING, once that is too long.
async fn silence(keepalive: &mut Keepalive) -> std::time::Duration {
    loop {
        if let Beat::Dead(silence) = poll_fn(|cx| keepalive.poll(cx)).await {
            return silence;
        }
    }
}

/// An error of the library, with what TLS said below it.
pub(super) fn text(err: &h2::Error) -> String {
    err.get_io().map_or_else(|| err.to_string(), describe)
}
