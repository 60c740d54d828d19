//! A delta discovery response taken apart without copying: submessages stay slices of the response
//! until their turn comes, so that never more than one resource is held as a tree.

use bytes::Bytes;
use prost::Message;

/// envoy.service.discovery.v3.DeltaDiscoveryResponse (facts ztunnel 6.5).
#[derive(Clone, PartialEq, Message)]
pub struct Delta {
    /// Each a serialised `Resource`.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub resources: Vec<Bytes>,
    #[prost(string, tag = "4")]
    pub type_url: String,
    #[prost(string, tag = "5")]
    pub nonce: String,
    #[prost(string, repeated, tag = "6")]
    pub removed: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Resource {
    #[prost(string, tag = "1")]
    pub version: String,
    #[prost(message, optional, tag = "2")]
    pub body: Option<Body>,
    #[prost(string, tag = "3")]
    pub name: String,
}

/// Whom a `Resource` answers: read only where names are asked for.
#[derive(Clone, PartialEq, Message)]
pub struct Names {
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(string, repeated, tag = "4")]
    pub aliases: Vec<String>,
}

/// google.protobuf.Any
#[derive(Clone, PartialEq, Message)]
pub struct Body {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}
