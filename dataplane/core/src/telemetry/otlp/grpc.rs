//! Unary gRPC calls over HTTP/2 without TLS: as little of it as a sender of telemetry needs.

use std::future::Future;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Method, Request, StatusCode};
use prost::Message;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Of connecting, and of a call until its status.
const PATIENCE: Duration = Duration::from_secs(10);
/// An answer holds a count and a short text.
const LONGEST_ANSWER: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Connect(std::io::Error),
    #[error("{0}")]
    Broken(#[from] h2::Error),
    #[error("nothing for {PATIENCE:?}")]
    Silent,
    #[error("http status {0}")]
    Http(StatusCode),
    #[error("grpc status {0}: {1}")]
    Status(u16, String),
    #[error("the answer can't be read")]
    Answer,
}

/// One connection, driven by a task of its own.
pub struct Channel {
    authority: String,
    send: SendRequest<Bytes>,
    driver: JoinHandle<()>,
}

impl Error {
    /// Whether the same may succeed later, by the list in OTLP's specification.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Broken(_) | Self::Silent => true,
            Self::Http(status) => [429, 502, 503, 504].contains(&status.as_u16()),
            Self::Status(code, _) => [1, 4, 8, 10, 11, 14, 15].contains(code),
            Self::Answer => false,
        }
    }
}

impl Channel {
    /// `authority` is host:port.
    pub async fn connect(authority: &str) -> Result<Self, Error> {
        patiently(async {
            let tcp = TcpStream::connect(authority)
                .await
                .map_err(Error::Connect)?;
            let (send, connection) = h2::client::handshake(tcp).await?;
            let driver = tokio::spawn(async move {
                // Calls fail with the reason.
                let _ = connection.await;
            });
            Ok(Self {
                authority: authority.to_owned(),
                send,
                driver,
            })
        })
        .await
    }

    pub async fn call<R: Message + Default>(
        &self,
        path: &str,
        message: &impl Message,
    ) -> Result<R, Error> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("http://{}{path}", self.authority))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .map_err(|_| Error::Answer)?;
        patiently(self.exchange(request, frame(message))).await
    }

    async fn exchange<R: Message + Default>(
        &self,
        request: Request<()>,
        body: Bytes,
    ) -> Result<R, Error> {
        let mut send = self.send.clone().ready().await?;
        let (answer, mut stream) = send.send_request(request, false)?;
        stream.send_data(body, true)?;
        let (head, mut body) = answer.await?.into_parts();
        if head.status != StatusCode::OK {
            return Err(Error::Http(head.status));
        }
        let mut answer = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            if answer.len() + data.len() > LONGEST_ANSWER {
                return Err(Error::Answer);
            }
            answer.extend_from_slice(&data);
        }
        // Without a body the status comes with the headers.
        let trailers = body.trailers().await?;
        check(trailers.as_ref().unwrap_or(&head.headers))?;
        let message = answer.get(5..).ok_or(Error::Answer)?;
        R::decode(message).map_err(|_| Error::Answer)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Uncompressed, with its length.
fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(5 + length);
    frame.put_u8(0);
    // A batch has a few megabytes at most.
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    frame.extend_from_slice(&message.encode_to_vec());
    frame.freeze()
}

fn check(headers: &HeaderMap) -> Result<(), Error> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let code = text("grpc-status").and_then(|code| code.parse().ok());
    match code.ok_or(Error::Answer)? {
        0 => Ok(()),
        code => {
            let text = text("grpc-message").unwrap_or_default();
            Err(Error::Status(code, text.chars().take(200).collect()))
        }
    }
}

async fn patiently<T>(what: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let done = tokio::time::timeout(PATIENCE, what).await;
    done.unwrap_or(Err(Error::Silent))
}
