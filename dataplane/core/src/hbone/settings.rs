//! HTTP/2 settings of HBONE (facts ztunnel 3.2).

use std::time::Duration;

use crate::config::Windows;

#[derive(Clone, Debug)]
pub struct Http2 {
    pub stream_window: u32,
    pub connection_window: u32,
    pub frame: u32,
    pub server_headers: u32,
    pub client_headers: u32,
    pub server_buffer: usize,
    pub client_buffer: usize,
    /// Streams a server lets a client open at once.
    pub max_streams: u32,
    pub ping_interval: Duration,
    pub ping_timeout: Duration,
}

/// The library ends a whole connection when unread small DATA frames (below 256 bytes) have used
/// this up. Its default lets one stalled application that is sent small messages take its
/// neighbours on the tunnel down before the flow control window stops the sender.
const SMALL_FRAME_BUDGET: usize = 64 << 20;

/// A full tunnel whose streams are all cancelled between two reads is no attack.
const CANCELLED_UNSEEN: usize = 200;

impl Default for Http2 {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame: 1 << 20,
            server_headers: 65_536,
            client_headers: 16_384,
            server_buffer: 400 << 10,
            client_buffer: 4 << 20,
            max_streams: 200,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
        }
    }
}

impl From<&Windows> for Http2 {
    fn from(windows: &Windows) -> Self {
        Self {
            stream_window: windows.stream,
            connection_window: windows.connection,
            frame: windows.frame,
            client_buffer: windows.stream as usize,
            ..Self::default()
        }
    }
}

impl Http2 {
    /// Ciphertext that TLS takes on before the socket has it. Room for a whole frame, so that it
    /// leaves in one call: what ends a call goes out as a short packet.
    pub fn tls_buffer(&self) -> usize {
        self.frame as usize + (64 << 10)
    }

    /// `streams` is assumed to be allowed until the peer says otherwise.
    pub fn client(&self, streams: u32) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.frame)
            .max_header_list_size(self.client_headers)
            .max_send_buffer_size(self.client_buffer)
            .initial_max_send_streams(streams as usize)
            .data_frame_budget(SMALL_FRAME_BUDGET)
            .enable_push(false);
        builder
    }

    pub fn server(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.frame)
            .max_header_list_size(self.server_headers)
            .max_send_buffer_size(self.server_buffer)
            .max_concurrent_streams(self.max_streams)
            .max_pending_accept_reset_streams(CANCELLED_UNSEEN)
            .data_frame_budget(SMALL_FRAME_BUDGET);
        builder
    }
}
