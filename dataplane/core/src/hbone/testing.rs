//! A server that answers as tests tell it, and what it takes to reach it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderMap;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::settings::Http2;
use super::{Connect, Connected, Dial, Error, Key, Pool, Request, Responder, Stream, Tunnel};
use crate::config::Limits;
use crate::identity::Identity;
use crate::inpod::Descriptors;
use crate::telemetry::Bounds;
use crate::tls::Credentials;
use crate::tls::testing::Ca;

pub const LONG: Duration = Duration::from_secs(20);

pub fn id(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account)
}

/// A CA, a client `web` and a server `db`.
pub struct Mesh {
    pub ca: Ca,
    pub web: Arc<Credentials>,
    pub db: Arc<Credentials>,
}

/// A listening server whose tunnels are driven in tasks; requests come out of `requests`.
pub struct Server {
    pub addr: SocketAddr,
    pub requests: mpsc::UnboundedReceiver<(Request, Responder)>,
    pub accepted: Arc<AtomicUsize>,
    pub drain: Arc<tokio::sync::Notify>,
    task: JoinHandle<()>,
}

impl Mesh {
    pub async fn new() -> Self {
        let ca = Ca::new("root");
        Self {
            web: ca.credentials(&id("web")).await,
            db: ca.credentials(&id("db")).await,
            ca,
        }
    }

    pub async fn server(&self, http2: Http2) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        self.server_on(listener, http2)
    }

    pub fn server_on(&self, listener: TcpListener, http2: Http2) -> Server {
        let (sender, requests) = mpsc::unbounded_channel();
        let accepted = Arc::new(AtomicUsize::new(0));
        let drain = Arc::new(tokio::sync::Notify::new());
        let addr = listener.local_addr().expect("bound");
        let task = tokio::spawn(serve(
            listener,
            self.db.clone(),
            http2,
            sender,
            accepted.clone(),
            drain.clone(),
        ));
        Server {
            addr,
            requests,
            accepted,
            drain,
            task,
        }
    }

    pub async fn connect(&self, pool: &Pool, dst: SocketAddr) -> Result<Connected, Error> {
        pool.connect(key(dst), &self.web, connect()).await
    }

    /// A stream from end to end.
    pub async fn pair(&self, pool: &Pool, server: &mut Server) -> (Stream, Stream) {
        let (client, far) = tokio::join!(self.connect(pool, server.addr), server.accept());
        (client.expect("connected").stream, far)
    }
}

impl Server {
    pub async fn request(&mut self) -> (Request, Responder) {
        let next = tokio::time::timeout(LONG, self.requests.recv()).await;
        next.expect("a request in time").expect("a server")
    }

    pub async fn accept(&mut self) -> Stream {
        let (_, responder) = self.request().await;
        responder.accept(HeaderMap::new()).expect("accepted")
    }

    pub fn tunnels(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn key(dst: SocketAddr) -> Key {
    Key {
        source: id("web"),
        expected: Arc::new([id("db")]),
        dst,
        owner: "db-1".into(),
        from: None,
    }
}

pub fn connect() -> Connect {
    let mut headers = HeaderMap::new();
    headers.insert(
        "baggage",
        http::HeaderValue::from_static("k8s.namespace.name=shop"),
    );
    Connect {
        authority: "192.0.2.7:80".to_owned(),
        headers,
    }
}

pub fn dial() -> Dial {
    Arc::new(|dst| Box::pin(TcpStream::connect(dst)))
}

pub fn new_pool(limits: Limits, dial: Dial) -> Arc<Pool> {
    pool_with(limits, dial, Http2::default())
}

pub fn pool_with(limits: Limits, dial: Dial, http2: Http2) -> Arc<Pool> {
    let sockets = Descriptors::of_process().share();
    let limits = Arc::new(ArcSwap::from_pointee(limits));
    Pool::new(limits, http2, dial, sockets, Bounds::default())
}

/// Ends with the test, which panics after `LONG`.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    if tokio::time::timeout(LONG, wait).await.is_err() {
        panic!("never: {what}");
    }
}

async fn serve(
    listener: TcpListener,
    credentials: Arc<Credentials>,
    http2: Http2,
    requests: mpsc::UnboundedSender<(Request, Responder)>,
    accepted: Arc<AtomicUsize>,
    drain: Arc<tokio::sync::Notify>,
) {
    let mut tunnels = tokio::task::JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        let (credentials, http2) = (credentials.clone(), http2.clone());
        let (requests, accepted) = (requests.clone(), accepted.clone());
        let drain = drain.clone();
        tunnels.spawn(async move {
            let limits = Limits::default();
            let Ok(mut tunnel) = Tunnel::accept(tcp, &credentials, &limits, &http2).await else {
                return;
            };
            accepted.fetch_add(1, Ordering::SeqCst);
            loop {
                tokio::select! {
                    next = tunnel.next() => match next {
                        Some(Ok(request)) => drop(requests.send(request)),
                        _ => return,
                    },
                    () = drain.notified() => tunnel.drain(),
                }
            }
        });
    }
}
