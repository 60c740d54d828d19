//! The answers that are made here (facts ztunnel 9.3).

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{CNAME, SRV};
use hickory_proto::rr::{Name, RData, Record};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};

use super::wire::{HEADER, Query};

/// facts ztunnel 9.3
const TTL: u32 = 30;

/// One answer of the mesh itself, to be filled and encoded.
pub struct Answer<'a> {
    query: &'a Query,
    message: Message,
    /// Under which the records stand.
    owner: Name,
}

impl<'a> Answer<'a> {
    /// Authoritative, without a record, NOERROR.
    pub fn new(query: &'a Query) -> Self {
        let message = base(query, ResponseCode::NoError);
        let owner = query.name.clone();
        let mut it = Self {
            query,
            message,
            owner,
        };
        it.message.metadata.authoritative = true;
        it
    }

    /// The asked name is another one for this; a name that can't be written changes nothing.
    pub fn alias(&mut self, name: &str) {
        let Some(name) = absolute(name) else { return };
        let cname = RData::CNAME(CNAME(name.clone()));
        let record = Record::from_rdata(self.query.name.clone(), TTL, cname);
        self.message.add_answer(record);
        self.owner = name;
    }

    pub fn addresses(&mut self, addresses: &[IpAddr]) {
        for ip in addresses {
            let record = Record::from_rdata(self.owner.clone(), TTL, address(*ip));
            self.message.add_answer(record);
        }
    }

    /// A service's place, with the addresses that its client will want next.
    pub fn place(&mut self, weight: u16, port: u16, target: &str, addresses: &[IpAddr]) {
        let Some(target) = absolute(target) else {
            return;
        };
        let srv = RData::SRV(SRV::new(0, weight, port, target.clone()));
        let record = Record::from_rdata(self.owner.clone(), TTL, srv);
        self.message.add_answer(record);
        let more = addresses.iter();
        let more = more.map(|ip| Record::from_rdata(target.clone(), TTL, address(*ip)));
        self.message.add_additionals(more);
    }

    /// In at most `room` bytes: with fewer records and TC where all don't fit.
    pub fn encode(mut self, room: usize) -> Vec<u8> {
        loop {
            let bytes = encode(&self.message);
            let Some(over) = bytes.len().checked_sub(room).filter(|over| *over > 0) else {
                return bytes;
            };
            if self.message.additionals.is_empty() {
                self.message.metadata.truncation = true;
                let answers = &mut self.message.answers;
                if answers.is_empty() {
                    return bytes;
                }
                // No address record is shorter than its sixteen bytes with a compressed name.
                let keep = answers.len().saturating_sub(over.div_ceil(28).max(1));
                answers.truncate(keep);
            } else {
                // Only a help, without which nothing is lost.
                self.message.additionals.clear();
            }
        }
    }
}

/// An answer that only says how it went.
pub fn failure(query: &Query, code: ResponseCode) -> Vec<u8> {
    encode(&base(query, code))
}

/// To what can't be read as a query: its id, and the code.
pub fn refusal(packet: &[u8], code: ResponseCode) -> Vec<u8> {
    let mut answer = vec![0; HEADER];
    answer[..2].copy_from_slice(&packet[..2]);
    // A response, of the same opcode and wish for recursion.
    answer[2] = 0x80 | (packet[2] & 0x79);
    answer[3] = code.low();
    answer
}

fn base(query: &Query, code: ResponseCode) -> Message {
    let mut message = Message::new(query.id, MessageType::Response, OpCode::Query);
    message.metadata.recursion_desired = query.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    let mut question = hickory_proto::op::Query::query(query.name.clone(), query.kind);
    question.set_query_class(query.class);
    message.add_query(question);
    if let Some(asked) = query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(asked.payload);
        edns.set_version(asked.version);
        edns.set_dnssec_ok(asked.dnssec);
        message.set_edns(edns);
    }
    message
}

fn address(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(ip) => RData::A(ip.into()),
        IpAddr::V6(ip) => RData::AAAA(ip.into()),
    }
}

fn absolute(name: &str) -> Option<Name> {
    let mut name = Name::from_ascii(name).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// The encoder only fails above 64 kB, and then marks what it left out.
fn encode(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(512);
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(u16::MAX);
    if let Err(error) = message.emit(&mut encoder) {
        tracing::error!(%error, "a DNS answer can't be encoded");
        return Vec::new();
    }
    bytes
}
