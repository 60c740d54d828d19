//! The socket's file: created by rename, replaced when stale, left alone when somebody serves it.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use super::instance::Instance;
use super::session::{self, Peer};

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error(
        "control socket {0} is in use by pid {1}: stop that data plane, or name another socket"
    )]
    InUse(PathBuf, i32),
    #[error("control socket {0} exists and is no socket")]
    NotASocket(PathBuf),
    #[error("control socket {0}: {1}")]
    Io(PathBuf, io::Error),
}

pub(super) struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Clone)]
pub(super) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

/// The agent, a successor, and people who look.
const MAX_CONNECTIONS: usize = 64;

impl ControlSocket {
    /// Needs a tokio context.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let io = |error| SocketError::Io(path.to_owned(), error);
        clear_the_way(path)?;
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(name);
        let _ = std::fs::remove_file(&temporary);
        let listener = StdListener::bind(&temporary).map_err(io)?;
        let published = publish(&temporary, path);
        if published.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        match published {
            Ok(()) => {}
            // Another data plane started at the same moment and won.
            Err(Errno::EXIST) => {
                clear_the_way(path)?;
                return Err(io(Errno::EXIST.into()));
            }
            Err(errno) => return Err(io(errno.into())),
        }
        listener.set_nonblocking(true).map_err(io)?;
        let listener = UnixListener::from_std(listener).map_err(io)?;
        let file = SocketFile {
            inode: inode(path).map_err(io)?,
            path: path.to_owned(),
        };
        Ok(Self { listener, file })
    }

    pub fn file(&self) -> SocketFile {
        self.file.clone()
    }

    /// Answers for ever.
    pub async fn serve(self, instance: Arc<Instance>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::error!(%error, "control socket: accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let peer = match stream.peer_cred() {
                Ok(peer) => Peer {
                    uid: peer.uid(),
                    pid: peer.pid().unwrap_or_default(),
                },
                Err(error) => {
                    tracing::warn!(%error, "control connection refused: peer unknown");
                    continue;
                }
            };
            if peer.uid != 0 && peer.uid != rustix::process::geteuid().as_raw() {
                tracing::warn!(uid = peer.uid, pid = peer.pid, "control connection refused");
                continue;
            }
            let Ok(place) = places.clone().try_acquire_owned() else {
                tracing::warn!(pid = peer.pid, "control connection refused: too many");
                continue;
            };
            let instance = instance.clone();
            tokio::spawn(async move {
                session::serve(instance, stream, peer).await;
                drop(place);
            });
        }
    }
}

impl SocketFile {
    /// At the process's end. Leaves a file alone that somebody else put there meanwhile.
    pub fn remove(&self) {
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// (number, device)
fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let meta = path.symlink_metadata()?;
    Ok((meta.ino(), meta.dev()))
}

fn publish(temporary: &Path, path: &Path) -> Result<(), Errno> {
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(temporary, private)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE)
}

/// Removes what a dead data plane left at `path`.
fn clear_the_way(path: &Path) -> Result<(), SocketError> {
    let io = |error| SocketError::Io(path.to_owned(), error);
    match StdStream::connect(path) {
        Ok(stream) => {
            let peer = rustix::net::sockopt::socket_peercred(&stream);
            let pid = peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get());
            Err(SocketError::InUse(path.to_owned(), pid))
        }
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT) => Ok(()),
            // Also what connecting to an ordinary file says.
            Some(Errno::CONNREFUSED) if is_socket(path) => std::fs::remove_file(path).map_err(io),
            Some(Errno::CONNREFUSED) => Err(SocketError::NotASocket(path.to_owned())),
            _ => Err(io(error)),
        },
    }
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.symlink_metadata()
        .is_ok_and(|meta| meta.file_type().is_socket())
}
