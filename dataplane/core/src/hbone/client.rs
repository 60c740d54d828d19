//! The client's side of one tunnel: how it is opened, what drives it, and a stream's place on it.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt;
use h2::Reason;
use h2::client::{Connection, SendRequest};
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use parking_lot::Mutex;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::gather::Gather;
use super::keepalive::{Beat, Heard, Keepalive};
use super::pool::{Counts, Inner};
use super::server::text;
use super::settings::Http2;
use super::socket::Socket;
use super::{Connect, Dial, Error, Key, Stream, until};
use crate::config::Limits;
use crate::identity::Identity;
use crate::inpod::Share;
use crate::tls::{Admission, Change, Proof, Tracked};

/// A tunnel that may carry streams. Its connection closes when the last holder is gone.
pub struct Tunnel {
    pub key: Key,
    pub peer: Identity,
    proof: Arc<Proof>,
    /// The first of both ends' certificates: no new stream after it.
    expires: SystemTime,
    send: SendRequest<Bytes>,
    pool: Weak<Inner>,
    /// Over the pool's bound: gone as soon as it is idle.
    pub unpooled: AtomicBool,
    active: AtomicUsize,
    pub idle_since: Mutex<Instant>,
    /// The peer's settings arrived.
    settled: AtomicBool,
    /// At least one request was answered.
    served: AtomicBool,
    /// Why it can't be used any more.
    ended: Mutex<Option<Error>>,
    killed: Arc<Notify>,
}

/// What one side of a handshake needs.
#[derive(Clone)]
pub struct Tls {
    pub config: Arc<ClientConfig>,
    pub admission: Admission,
    /// Of the certificate in it.
    pub expires: SystemTime,
}

/// A stream's place on a tunnel, counted until it is dropped.
pub struct Slot {
    pub tunnel: Arc<Tunnel>,
}

/// Why a request wasn't answered.
pub enum Failure {
    /// A tunnel that had served before turned out to have ended: the request wasn't processed,
    /// and this says nothing about the peer.
    Stale,
    /// The peer has not processed it: it may be sent again, on another tunnel.
    Unprocessed(Error),
    Final(Error),
}

/// What the task of a new tunnel needs.
pub struct Dialling {
    pub key: Key,
    pub tls: Tls,
    pub dial: Dial,
    /// As of now, for the handshakes.
    pub limits: Arc<Limits>,
    pub http2: Http2,
    pub sockets: Arc<Share>,
    pub pool: Weak<Inner>,
    /// Set when everything must end.
    pub cut: watch::Receiver<bool>,
}

/// Makes sure that those who wait for a tunnel learn how that ended, also when its task panics.
struct Opening {
    pool: Weak<Inner>,
    key: Key,
    told: bool,
}

type Driver = Connection<TlsStream<Socket>, Bytes>;

impl Tunnel {
    /// Streams on it now.
    pub fn active(&self) -> usize {
        self.active.load(Ordering::Acquire)
    }

    /// Whether one more stream may be opened. One place below the maximum stays free (facts
    /// ztunnel 15.3); before the peer's settings are known there is one stream.
    pub fn has_room(&self, limits: &Limits) -> bool {
        if self.ended.lock().is_some() || self.expired() {
            return false;
        }
        let max = match self.settled.load(Ordering::Acquire) {
            true => self
                .send
                .current_max_send_streams()
                .min(limits.pool_max_streams as usize),
            false => 1,
        };
        self.active() < max.saturating_sub(1).max(1)
    }

    /// Only under the pool's lock, which makes `has_room` and this one step.
    pub fn take(self: &Arc<Self>) -> Slot {
        self.active.fetch_add(1, Ordering::AcqRel);
        if let Some(pool) = self.pool.upgrade() {
            pool.counts.streams.fetch_add(1, Ordering::Relaxed);
        }
        Slot {
            tunnel: self.clone(),
        }
    }

    /// Idle time, if it is idle.
    pub fn idle(&self, now: Instant) -> Option<Duration> {
        (self.active() == 0).then(|| now.saturating_duration_since(*self.idle_since.lock()))
    }

    fn end(&self, error: Error) {
        self.ended.lock().get_or_insert(error);
    }

    /// Ends it now, with its streams.
    pub fn kill(&self, error: Error) {
        self.end(error);
        self.killed.notify_one();
    }

    /// Why we ended it, where it wasn't the peer who did, nor a drain.
    pub fn cut_for(&self) -> Option<Error> {
        let ended = self.ended.lock().clone();
        ended.filter(|error| matches!(error, Error::Timeout(..) | Error::Moved(_)))
    }

    fn expired(&self) -> bool {
        self.expires <= SystemTime::now()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let tunnel = &self.tunnel;
        *tunnel.idle_since.lock() = Instant::now();
        let last = tunnel.active.fetch_sub(1, Ordering::AcqRel) == 1;
        if let Some(pool) = tunnel.pool.upgrade() {
            pool.counts.streams.fetch_sub(1, Ordering::Relaxed);
            if last && tunnel.unpooled.load(Ordering::Relaxed) {
                pool.retire_idle(tunnel);
            }
        }
    }
}

impl Slot {
    /// Sends the CONNECT and waits for its answer; the slot stays with the stream.
    pub async fn request(
        self,
        connect: &Connect,
        limit: Duration,
    ) -> Result<(Stream, HeaderMap), Failure> {
        let dst = self.tunnel.key.dst;
        let request = request(connect)
            .map_err(|err| Failure::Final(Error::Http2(dst, format!("authority: {err}"))))?;
        match tokio::time::timeout(limit, self.exchange(request)).await {
            Ok(result) => result,
            Err(_) => Err(Failure::Final(Error::Timeout(dst, "CONNECT", limit))),
        }
    }

    async fn exchange(self, request: Request<()>) -> Result<(Stream, HeaderMap), Failure> {
        let tunnel = self.tunnel.clone();
        let sender = tunnel.send.clone().ready().await;
        let (response, send) = sender
            .and_then(|mut sender| sender.send_request(request, false))
            .map_err(|err| tunnel.unsent(&err))?;
        let response = response.await.map_err(|err| tunnel.unanswered(&err))?;
        tunnel.served.store(true, Ordering::Relaxed);
        let (parts, recv) = response.into_parts();
        if parts.status != StatusCode::OK {
            return Err(Failure::Final(Error::Status(parts.status.as_u16())));
        }
        let stream = Stream::new(send, recv, Some(self), None, tunnel.proof.clone());
        Ok((stream, parts.headers))
    }
}

impl Tunnel {
    /// The request never left.
    fn unsent(&self, err: &h2::Error) -> Failure {
        match err.is_go_away() || err.is_io() || self.ended.lock().is_some() {
            true => self.over(err),
            false => Failure::Final(self.why(err)),
        }
    }

    fn unanswered(&self, err: &h2::Error) -> Failure {
        // The library gives a peer's GOAWAY only to streams above the last one it processed.
        if err.is_go_away() && err.is_remote() {
            return self.over(err);
        }
        match err.is_reset() && err.reason() == Some(Reason::REFUSED_STREAM) {
            true => Failure::Unprocessed(self.why(err)),
            false => Failure::Final(self.why(err)),
        }
    }

    /// The tunnel takes no more requests, and this one wasn't processed.
    fn over(&self, err: &h2::Error) -> Failure {
        let error = self.why(err);
        self.end(error.clone());
        match self.served.load(Ordering::Relaxed) {
            true => Failure::Stale,
            false => Failure::Unprocessed(error),
        }
    }

    /// The connection's own end tells more than what the library tells each stream.
    fn why(&self, err: &h2::Error) -> Error {
        let ended = match err.is_io() {
            true => self.ended.lock().clone(),
            false => None,
        };
        let settled = self.settled.load(Ordering::Acquire);
        ended.unwrap_or_else(|| broken(self.key.dst, err, settled))
    }
}

impl Opening {
    fn tell(&mut self, result: Result<(), Error>) {
        if !self.told
            && let Some(pool) = self.pool.upgrade()
        {
            pool.opened(&self.key, result);
        }
        self.told = true;
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let text = "dialling ended without a result".to_owned();
        self.tell(Err(Error::Connect(self.key.dst, text)));
    }
}

/// Opens the tunnel, hands it to the pool, and drives it to its end.
pub async fn run(dialling: Dialling) {
    let mut opening = Opening {
        pool: dialling.pool.clone(),
        key: dialling.key.clone(),
        told: false,
    };
    let _socket = match dialling.sockets.take(1) {
        Ok(held) => held,
        Err(none) => return opening.tell(Err(Error::NoSocket(dialling.key.dst, none))),
    };
    // The state of handshakes is large and soon over: not in the driver's own future.
    let opened = {
        let mut cut = dialling.cut.clone();
        let opened = Box::pin(open(&dialling));
        tokio::select! {
            biased;
            _ = cut.wait_for(|cut| *cut) => Err(Error::Draining),
            opened = opened => opened,
        }
    };
    let (tunnel, connection, keepalive, tracked) = match opened {
        Ok(parts) => parts,
        Err(error) => return opening.tell(Err(error)),
    };
    let Some(pool) = dialling.pool.upgrade() else {
        return;
    };
    let _live = Live::new(pool.counts.clone());
    let weak = Arc::downgrade(&tunnel);
    if pool.admit(tunnel) {
        drop(pool);
        drive(
            &dialling,
            &mut opening,
            &weak,
            connection,
            keepalive,
            &tracked,
        )
        .await;
    }
}

/// A tunnel in the counts.
struct Live(Arc<Counts>);

impl Live {
    fn new(counts: Arc<Counts>) -> Self {
        counts.tunnels.fetch_add(1, Ordering::Relaxed);
        counts.bounds.outbound_tunnels.inc();
        Self(counts)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.tunnels.fetch_sub(1, Ordering::Relaxed);
        self.0.bounds.outbound_tunnels.dec();
    }
}

async fn open(dialling: &Dialling) -> Result<(Arc<Tunnel>, Driver, Keepalive, Tracked), Error> {
    let (dst, limits) = (dialling.key.dst, &dialling.limits);
    still_valid(dst, dialling.tls.expires)?;
    let limit = limits.connect_timeout;
    let tcp = match tokio::time::timeout(limit, (dialling.dial)(dst)).await {
        Ok(Ok(tcp)) => tcp,
        // The kernel may lose its patience before we do.
        Ok(Err(err)) if err.kind() == std::io::ErrorKind::TimedOut => {
            return Err(Error::ConnectTimeout(dst, limit));
        }
        Ok(Err(err)) => return Err(Error::Connect(dst, err.to_string())),
        Err(_) => return Err(Error::ConnectTimeout(dst, limit)),
    };
    let limit = limits.tls_handshake_timeout;
    let heard = Heard::default();
    let handshakes = async {
        // Not sent and not checked: identities count, not names.
        let name = ServerName::from(dst.ip());
        let mut tls = TlsConnector::from(dialling.tls.config.clone())
            .connect(name, Socket::new(tcp, heard.clone()))
            .await
            .map_err(|err| Error::tls(dst, &err))?;
        let peer = dialling.tls.admission.admit(tls.get_ref().1, dst);
        let peer = peer.map_err(|distrust| Error::Untrusted(dst, distrust))?;
        tls.get_mut()
            .1
            .set_buffer_limit(Some(dialling.http2.tls_buffer()));
        let client = dialling.http2.client(limits.pool_max_streams);
        let (send, connection) = client
            .handshake::<_, Bytes>(tls)
            .await
            .map_err(|err| broken(dst, &err, false))?;
        Ok((peer, send, connection))
    };
    let (peer, send, mut connection) = match tokio::time::timeout(limit, handshakes).await {
        Ok(result) => result?,
        Err(_) => return Err(Error::Timeout(dst, "TLS handshake", limit)),
    };
    let expires = peer.expires.min(dialling.tls.expires);
    still_valid(dst, expires)?;
    let pings = connection
        .ping_pong()
        .ok_or_else(|| Error::Http2(dst, "PINGs are taken".to_owned()))?;
    let http2 = &dialling.http2;
    let keepalive = Keepalive::new(pings, heard, http2.ping_interval, http2.ping_timeout);
    let keepalive = keepalive.at_once(limit);
    let tunnel = Tunnel {
        key: dialling.key.clone(),
        peer: peer.identity,
        proof: peer.tracked.proof().clone(),
        expires,
        send,
        pool: dialling.pool.clone(),
        unpooled: AtomicBool::new(false),
        active: AtomicUsize::new(0),
        idle_since: Mutex::new(Instant::now()),
        settled: AtomicBool::new(false),
        served: AtomicBool::new(false),
        ended: Mutex::new(None),
        killed: Arc::default(),
    };
    Ok((Arc::new(tunnel), connection, keepalive, peer.tracked))
}

/// Nobody could use a tunnel of an expired certificate, and whoever waits would dial again and again.
fn still_valid(dst: SocketAddr, expires: SystemTime) -> Result<(), Error> {
    match expires <= SystemTime::now() {
        true => Err(Error::Tls(dst, "a certificate has just expired".to_owned())),
        false => Ok(()),
    }
}

/// Until the connection ends by itself, the peer is dead or trusted no longer, the pool is cut, or
/// nobody used the tunnel for long.
async fn drive(
    dialling: &Dialling,
    opening: &mut Opening,
    tunnel: &Weak<Tunnel>,
    mut connection: Driver,
    mut keepalive: Keepalive,
    tracked: &Tracked,
) {
    let dst = dialling.key.dst;
    let look = next_look(dialling, tunnel);
    let idle = tokio::time::sleep(look);
    tokio::pin!(idle);
    let killed = tunnel.upgrade().map(|t| t.killed.clone());
    let killed = killed.unwrap_or_default();
    let mut cut = dialling.cut.clone();
    let mut gather = Gather::default();
    let error = loop {
        tokio::select! {
            biased;
            ended = poll_fn(|cx| gather.poll(cx, |cx| connection.poll_unpin(cx))) => break ended_by(dst, ended, opening.told),
            beat = poll_fn(|cx| keepalive.poll(cx)) => match beat {
                Beat::Dead(silence) => break Error::Timeout(dst, "PING", silence),
                Beat::Answered => {
                    if let Some(tunnel) = tunnel.upgrade() {
                        tunnel.settled.store(true, Ordering::Release);
                    }
                    opening.tell(Ok(()));
                }
            },
            _ = cut.wait_for(|cut| *cut) => break Error::Draining,
            () = killed.notified() => break Error::Moved(dst),
            change = tracked.changed() => match change {
                Change::Drain => retire(dialling, tunnel),
                Change::Cut(distrust) => break Error::Untrusted(dst, distrust),
            },
            () = &mut idle => {
                // Without holders the connection ends by itself, with GOAWAY.
                let next = next_look(dialling, tunnel);
                idle.as_mut().reset(Instant::now() + next);
            }
        }
    };
    // First the reason, then the connection: whoever is woken by its end finds the reason.
    if let Some(tunnel) = tunnel.upgrade() {
        tunnel.end(error.clone());
        if let Some(pool) = dialling.pool.upgrade() {
            pool.retire(&tunnel);
        }
    }
    drop(connection);
    opening.tell(Err(error));
}

/// No new streams; the tunnel ends with its last one.
fn retire(dialling: &Dialling, tunnel: &Weak<Tunnel>) {
    if let (Some(tunnel), Some(pool)) = (tunnel.upgrade(), dialling.pool.upgrade()) {
        pool.retire(&tunnel);
    }
}

/// Lets the pool forget the tunnel when it has been idle for long enough or a certificate has
/// expired, else says when to look again.
fn next_look(dialling: &Dialling, tunnel: &Weak<Tunnel>) -> Duration {
    let (Some(tunnel), Some(pool)) = (tunnel.upgrade(), dialling.pool.upgrade()) else {
        return dialling.limits.pool_idle;
    };
    let release = pool.limits().pool_idle;
    if tunnel.expired() {
        pool.retire(&tunnel);
        return release;
    }
    let next = match tunnel.idle(Instant::now()) {
        Some(idle) if idle >= release => {
            pool.retire_idle(&tunnel);
            release
        }
        Some(idle) => release.saturating_sub(idle),
        None => release,
    };
    next.min(until(tunnel.expires))
}

fn ended_by(dst: SocketAddr, ended: Result<(), h2::Error>, settled: bool) -> Error {
    match ended {
        Ok(()) => Error::Http2(dst, "the peer closed the connection".to_owned()),
        Err(err) => broken(dst, &err, settled),
    }
}

/// HTTP/2 keeps only kind and text of what failed below it; TLS errors are of this kind. A client
/// learns here, after its own handshake, that the server refused its certificate. It may also find
/// the connection closed before it could read the alert: until the peer's settings came, that is
/// what a closed connection means.
fn broken(dst: SocketAddr, err: &h2::Error, settled: bool) -> Error {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, InvalidData};
    match err.get_io().map(std::io::Error::kind) {
        Some(InvalidData) => Error::Tls(dst, text(err)),
        Some(BrokenPipe | ConnectionReset) if !settled => {
            let why = "closed right after the handshake: the peer may have refused our certificate";
            Error::Tls(dst, format!("{why} ({})", text(err)))
        }
        _ => Error::Http2(dst, text(err)),
    }
}

pub(super) fn request(connect: &Connect) -> Result<Request<()>, http::Error> {
    let uri = Uri::builder()
        .authority(connect.authority.as_str())
        .build()?;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(uri)
        .body(())?;
    *request.headers_mut() = connect.headers.clone();
    Ok(request)
}
