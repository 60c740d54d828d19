//! Tunnels that are shared: one dial at a time for each key, whose end everybody who waits learns.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ahash::RandomState;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{self, Dialling, Failure, Slot, Tls, Tunnel};
use super::nested::Nested;
use super::settings::Http2;
use super::{Connect, Connected, Dial, Error, Key};
use crate::config::{Limits, LiveLimits};
use crate::identity::Identity;
use crate::inpod::Share;
use crate::telemetry::Bounds;
use crate::tls::Credentials;

/// Room that an emptied map may keep.
const SPARE: usize = 64;

/// Tunnels of one pod.
pub struct Pool {
    inner: Arc<Inner>,
    dial: Dial,
    http2: Http2,
    sockets: Arc<Share>,
}

/// What tunnels see of their pool.
pub struct Inner {
    limits: LiveLimits,
    state: Mutex<State>,
    cut: watch::Sender<bool>,
    pub counts: Arc<Counts>,
}

#[derive(Default)]
pub struct Counts {
    pub tunnels: AtomicUsize,
    pub streams: AtomicUsize,
    pub bounds: Bounds,
}

#[derive(Default)]
struct State {
    keys: HashMap<Key, Entry, RandomState>,
    /// Tunnels in `keys`.
    tunnels: usize,
    /// No new streams.
    closed: bool,
}

/// Never empty while it is in the map.
#[derive(Default)]
struct Entry {
    tunnels: Vec<Arc<Tunnel>>,
    /// Present while a tunnel is being dialled, or its peer's settings haven't arrived.
    opening: Option<watch::Sender<Opening>>,
}

#[derive(Clone)]
enum Opening {
    Dialling,
    /// A first stream may be opened.
    Connected,
    /// All may look again.
    Settled,
    Failed(Error),
}

impl Pool {
    /// Its tunnels count as the pod's `sockets`.
    pub fn new(
        limits: LiveLimits,
        http2: Http2,
        dial: Dial,
        sockets: Arc<Share>,
        bounds: Bounds,
    ) -> Arc<Self> {
        let inner = Inner {
            limits,
            state: Mutex::default(),
            cut: watch::Sender::new(false),
            counts: Arc::new(Counts {
                bounds,
                ..Counts::default()
            }),
        };
        Arc::new(Self {
            inner: Arc::new(inner),
            dial,
            http2,
            sockets,
        })
    }

    /// A stream on a shared or new tunnel. A failed dial fails everybody who waited for it. What a
    /// peer provably didn't process is sent once more, on another tunnel; tunnels that turn out to
    /// have ended since their last use don't count.
    pub async fn connect(
        &self,
        key: Key,
        credentials: &Credentials,
        connect: Connect,
    ) -> Result<Connected, Error> {
        let tls = Tls {
            config: credentials
                .client(&key.expected)
                .map_err(|err| Error::Tls(key.dst, err.to_string()))?,
            admission: credentials.admit_servers(&key.expected),
            expires: credentials.not_after,
        };
        let limit = self.inner.limits().connect_answer_timeout;
        let mut avoid: Option<Arc<Tunnel>> = None;
        let mut retried = false;
        loop {
            let slot = self.checkout(&key, &tls, avoid.as_ref()).await?;
            let tunnel = slot.tunnel.clone();
            match slot.request(&connect, limit).await {
                Ok((stream, headers)) => {
                    let peer = tunnel.peer.clone();
                    return Ok(Connected {
                        stream,
                        peer,
                        headers,
                    });
                }
                Err(Failure::Stale) => self.inner.retire(&tunnel),
                Err(Failure::Unprocessed(error)) if retried => return Err(error),
                Err(Failure::Unprocessed(_)) => {
                    retried = true;
                    avoid = Some(tunnel);
                }
                Err(Failure::Final(error)) => return Err(error),
            }
        }
    }

    /// A second tunnel inside one of this pool's streams, to one of `expected` behind `via`.
    pub fn nested<'a>(
        &'a self,
        via: SocketAddr,
        expected: &'a Arc<[Identity]>,
        credentials: &'a Credentials,
    ) -> Nested<'a> {
        Nested {
            expected,
            credentials,
            via,
            limits: self.inner.limits(),
            http2: &self.http2,
            cut: self.inner.cut.subscribe(),
        }
    }

    /// Refuses new streams; open ones go on until they end or the pool is dropped/cut.
    pub fn drain(&self) {
        let keys = {
            let mut state = self.inner.state.lock();
            state.closed = true;
            state.tunnels = 0;
            std::mem::take(&mut state.keys)
        };
        for opening in keys.into_values().filter_map(|entry| entry.opening) {
            opening.send_replace(Opening::Failed(Error::Draining));
        }
    }

    /// Ends every tunnel now.
    pub fn cut(&self) {
        self.drain();
        self.inner.cut.send_replace(true);
    }

    /// After `cut`: returns when no dial or tunnel is left, and no socket of theirs.
    pub async fn gone(&self) {
        // Each of their tasks listens for the cut as long as it runs.
        self.inner.cut.closed().await;
    }

    /// Ends every tunnel whose key is `gone`, with its streams.
    pub fn end_where(&self, gone: impl Fn(&Key) -> bool) {
        let ended: Vec<_> = {
            let mut state = self.inner.state.lock();
            let tunnels = state.keys.iter().filter(|(key, _)| gone(key));
            let ended: Vec<_> = tunnels.flat_map(|(_, e)| e.tunnels.clone()).collect();
            ended.iter().for_each(|tunnel| state.remove(tunnel));
            ended
        };
        for tunnel in ended {
            tunnel.kill(Error::Moved(tunnel.key.dst));
        }
    }

    /// (tunnels, streams)
    pub fn size(&self) -> (usize, usize) {
        let counts = &self.inner.counts;
        (
            counts.tunnels.load(Ordering::Relaxed),
            counts.streams.load(Ordering::Relaxed),
        )
    }

    #[cfg(test)]
    pub(super) fn keys(&self) -> (usize, usize) {
        let state = self.inner.state.lock();
        (state.keys.len(), state.keys.capacity())
    }

    /// A place on a tunnel of this key, other than `avoid`.
    async fn checkout(
        &self,
        key: &Key,
        tls: &Tls,
        avoid: Option<&Arc<Tunnel>>,
    ) -> Result<Slot, Error> {
        loop {
            let mut opening = {
                let mut state = self.inner.state.lock();
                if state.closed {
                    return Err(Error::Draining);
                }
                let entry = match state.keys.get_mut(key) {
                    Some(entry) => entry,
                    None => state.keys.entry(key.clone()).or_default(),
                };
                if let Some(tunnel) = entry.with_room(avoid, &self.inner.limits()) {
                    return Ok(tunnel.take());
                }
                match &entry.opening {
                    Some(opening) => opening.subscribe(),
                    None => {
                        let sender = watch::Sender::new(Opening::Dialling);
                        let opening = sender.subscribe();
                        entry.opening = Some(sender);
                        self.start(key, tls.clone());
                        opening
                    }
                }
            };
            // The sender goes with the entry only after its last word.
            let _ = opening.changed().await;
            if let Opening::Failed(error) = &*opening.borrow() {
                return Err(error.clone());
            }
        }
    }

    /// In a task of its own: who asked for the tunnel may go away, others wait for it too.
    fn start(&self, key: &Key, tls: Tls) {
        let dialling = Dialling {
            key: key.clone(),
            tls,
            dial: self.dial.clone(),
            limits: self.inner.limits(),
            sockets: self.sockets.clone(),
            http2: self.http2.clone(),
            pool: Arc::downgrade(&self.inner),
            cut: self.inner.cut.subscribe(),
        };
        tokio::spawn(client::run(dialling));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.cut();
    }
}

impl Inner {
    pub fn limits(&self) -> Arc<Limits> {
        self.limits.load_full()
    }

    /// Takes a new tunnel in; false when nobody wants it any more. Over the bound the tunnel that
    /// was idle longest makes room; where none is idle, this one leaves when it gets idle.
    pub fn admit(&self, tunnel: Arc<Tunnel>) -> bool {
        let mut state = self.state.lock();
        if state.closed {
            return false;
        }
        // More than one where the bound was lowered meanwhile.
        while state.tunnels >= self.limits.load().pool_max_tunnels as usize {
            if !state.evict() {
                tunnel.unpooled.store(true, Ordering::Relaxed);
                break;
            }
            self.counts.bounds.tunnels_evicted.inc();
        }
        state.tunnels += 1;
        let entry = state.keys.entry(tunnel.key.clone()).or_default();
        entry.tunnels.push(tunnel);
        if let Some(opening) = &entry.opening {
            opening.send_replace(Opening::Connected);
        }
        true
    }

    /// The one word about how the opening of this key ended.
    pub fn opened(&self, key: &Key, result: Result<(), Error>) {
        let opening = {
            let mut state = self.state.lock();
            let opening = state.keys.get_mut(key).and_then(|e| e.opening.take());
            state.tidy(key);
            opening
        };
        if let Some(opening) = opening {
            opening.send_replace(match result {
                Ok(()) => Opening::Settled,
                Err(error) => Opening::Failed(error),
            });
        }
    }

    /// No new streams on this tunnel.
    pub fn retire(&self, tunnel: &Arc<Tunnel>) {
        self.state.lock().remove(tunnel);
    }

    /// As `retire`, unless a stream was opened meanwhile.
    pub fn retire_idle(&self, tunnel: &Arc<Tunnel>) {
        let mut state = self.state.lock();
        if tunnel.active() == 0 {
            state.remove(tunnel);
        }
    }
}

impl State {
    fn remove(&mut self, tunnel: &Arc<Tunnel>) {
        let Some(entry) = self.keys.get_mut(&tunnel.key) else {
            return;
        };
        let before = entry.tunnels.len();
        entry.tunnels.retain(|t| !Arc::ptr_eq(t, tunnel));
        self.tunnels -= before - entry.tunnels.len();
        self.tidy(&tunnel.key);
    }

    /// Keeps the map as small as what is in it.
    fn tidy(&mut self, key: &Key) {
        let empty = |e: &Entry| e.tunnels.is_empty() && e.opening.is_none();
        if self.keys.get(key).is_some_and(empty) {
            self.keys.remove(key);
            if self.keys.capacity() > SPARE && self.keys.len() < self.keys.capacity() / 4 {
                self.keys.shrink_to(SPARE);
            }
        }
    }

    /// Drops the tunnel that has been idle longest; false when none is idle.
    fn evict(&mut self) -> bool {
        let now = Instant::now();
        let tunnels = self.keys.values().flat_map(|entry| &entry.tunnels);
        let idlest = tunnels
            .filter_map(|t| t.idle(now).map(|idle| (idle, t)))
            .max_by_key(|(idle, _)| *idle)
            .map(|(_, tunnel)| tunnel.clone());
        match idlest {
            Some(tunnel) => {
                self.remove(&tunnel);
                true
            }
            None => false,
        }
    }
}

impl Entry {
    fn with_room(&self, avoid: Option<&Arc<Tunnel>>, limits: &Limits) -> Option<&Arc<Tunnel>> {
        let other = |t: &&Arc<Tunnel>| !avoid.is_some_and(|avoid| Arc::ptr_eq(t, avoid));
        self.tunnels
            .iter()
            .filter(other)
            .find(|t| t.has_room(limits))
    }
}
