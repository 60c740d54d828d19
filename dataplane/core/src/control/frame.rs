//! Framing of the control socket: a 4-byte big-endian length and that many bytes; descriptors come
//! with a frame's first bytes (proto/control.proto).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

pub(super) const MAX_FRAME: usize = 256 << 20;
/// A pod has one namespace or three listeners; the rest is room to answer a mistake politely.
const MAX_FDS: usize = 16;
/// How much memory a frame gets ahead of the bytes that have really arrived.
const STEP: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct Frame {
    pub body: Bytes,
    pub fds: Vec<OwnedFd>,
    /// The sender passed more descriptors than we take, or than this process may open.
    pub fds_lost: bool,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLong(usize),
    #[error("the connection ended inside a frame")]
    Truncated,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The next frame; None when the peer is done. Never reads beyond it, so that its descriptors can't
/// be taken for the next one's. Not cancel safe.
pub(super) async fn read(stream: &UnixStream) -> Result<Option<Frame>, FrameError> {
    let mut received = Received::default();
    let mut header = [0; 4];
    let mut filled = 0;
    while filled < header.len() {
        match received.some(stream, &mut header[filled..]).await? {
            0 if filled == 0 => return Ok(None),
            0 => return Err(FrameError::Truncated),
            more => filled += more,
        }
    }
    let length = u32::from_be_bytes(header) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length));
    }
    // Address space only; pages are touched as bytes arrive.
    let mut body = Vec::with_capacity(length);
    let mut filled = 0;
    while filled < length {
        body.resize(length.min(filled + STEP), 0);
        match received.some(stream, &mut body[filled..]).await? {
            0 => return Err(FrameError::Truncated),
            more => filled += more,
        }
    }
    Ok(Some(Frame {
        body: body.into(),
        fds: received.fds,
        fds_lost: received.lost,
    }))
}

/// Writes one frame, its descriptors with the first bytes.
pub(super) async fn write(
    stream: &UnixStream,
    message: &impl prost::Message,
    fds: &[OwnedFd],
) -> io::Result<()> {
    let length = message.encoded_len();
    let prefix = u32::try_from(length)
        .ok()
        .filter(|_| length <= MAX_FRAME)
        .ok_or_else(|| io::Error::other(format!("a message of {length} bytes is too long")))?;
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend_from_slice(&prefix.to_be_bytes());
    message
        .encode(&mut bytes)
        .map_err(|error| io::Error::other(error.to_string()))?;
    let mut fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut sent = 0;
    while sent < bytes.len() {
        sent += stream
            .async_io(Interest::WRITABLE, || send(stream, &bytes[sent..], &fds))
            .await?;
        fds.clear();
    }
    Ok(())
}

#[derive(Default)]
struct Received {
    fds: Vec<OwnedFd>,
    lost: bool,
}

impl Received {
    async fn some(&mut self, stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
        stream
            .async_io(Interest::READABLE, || self.receive(stream, buffer))
            .await
    }

    fn receive(&mut self, stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(buffer)];
        let got = recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        self.lost |= got.flags.contains(ReturnFlags::CTRUNC);
        Ok(got.bytes)
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        let text = format!("{} descriptors don't fit into a frame", fds.len());
        return Err(io::Error::other(text));
    }
    let buffers = [IoSlice::new(bytes)];
    Ok(sendmsg(
        stream,
        &buffers,
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}
