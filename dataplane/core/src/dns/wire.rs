//! DNS messages as bytes: what a query asks, whether an answer belongs to it, and where its TTLs
//! are. What is relayed is never taken apart further, so that all of it survives.

use std::ops::Range;

use hickory_proto::op::{Header, MessageType, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

/// What is in front of the first question.
pub const HEADER: usize = 12;
/// A client without EDNS takes no more over UDP (RFC 1035 4.2.1).
const SMALLEST_PAYLOAD: u16 = 512;
const OPT: u16 = 41;
const SOA: u16 = 6;
const TC: u8 = 0x02;
const QR: u8 = 0x80;
const AD_CD: u8 = 0x30;
const RD: u8 = 0x01;

/// A query with one question.
#[derive(Clone, Debug)]
pub struct Query {
    pub id: u16,
    /// As the client wrote it.
    pub name: Name,
    pub kind: RecordType,
    pub class: DNSClass,
    pub recursion_desired: bool,
    pub edns: Option<Edns>,
    /// Of the question section.
    pub question: Range<usize>,
    /// Nothing in it but the question, header flags and EDNS without options: another client's
    /// answer to the same would be the same.
    pub plain: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns {
    pub payload: u16,
    pub version: u8,
    pub dnssec: bool,
}

/// Why a packet isn't served.
#[derive(Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Too short to be told anything.
    Drop,
    Refuse(ResponseCode),
}

/// One resource record, by its place.
struct Record {
    kind: u16,
    class: u16,
    ttl: u32,
    ttl_at: usize,
    data: Range<usize>,
}

/// How long an answer may be kept.
#[derive(Debug, PartialEq, Eq)]
pub struct Lifetime {
    pub seconds: u32,
    /// Where TTLs stand that grow old with it.
    pub ttls: Vec<u16>,
}

impl Query {
    pub fn parse(bytes: &[u8]) -> Result<Self, Unusable> {
        let mut decoder = BinDecoder::new(bytes);
        let malformed = Unusable::Refuse(ResponseCode::FormErr);
        let Ok(header) = Header::read(&mut decoder) else {
            return Err(if bytes.len() < HEADER {
                Unusable::Drop
            } else {
                malformed
            });
        };
        let meta = header.metadata;
        // facts ztunnel 9.3
        if meta.message_type == MessageType::Response {
            return Err(malformed);
        }
        if meta.op_code != OpCode::Query {
            return Err(Unusable::Refuse(ResponseCode::NotImp));
        }
        if header.counts.queries != 1 {
            return Err(malformed);
        }
        let question = Question::read(&mut decoder).map_err(|_| Unusable::Refuse(FORMAT))?;
        let end = decoder.index();
        // A compressed first name would point into the header.
        let uncompressed =
            label_end(bytes, HEADER).is_some_and(|(at, plain)| plain && at + 4 == end);
        let rest = usize::from(header.counts.answers)
            + usize::from(header.counts.authorities)
            + usize::from(header.counts.additionals);
        let records = uncompressed.then(|| records(bytes, end, rest)).flatten();
        let Some((records, end_of_all)) = records else {
            return Err(malformed);
        };
        let opt = records.iter().find(|record| record.kind == OPT);
        let edns = opt.map(|opt| Edns {
            payload: opt.class.max(SMALLEST_PAYLOAD),
            version: opt.ttl.to_be_bytes()[1],
            dnssec: opt.ttl & 0x8000 != 0,
        });
        let bare = opt.is_none_or(|opt| opt.data.is_empty() && opt.ttl & 0x7fff == 0);
        Ok(Self {
            id: meta.id,
            name: question.name,
            kind: question.query_type,
            class: question.query_class,
            recursion_desired: meta.recursion_desired,
            plain: bare
                && records.len() == usize::from(edns.is_some())
                && end_of_all == bytes.len(),
            edns,
            question: HEADER..end,
        })
    }

    /// The largest UDP answer that the client takes.
    pub fn payload(&self) -> usize {
        self.edns
            .map_or(SMALLEST_PAYLOAD, |edns| edns.payload)
            .into()
    }

    /// What decides the answer, besides who is asked; None where an answer is this client's alone.
    pub fn key(&self, bytes: &[u8]) -> Option<Box<[u8]>> {
        let question = bytes.get(self.question.clone()).filter(|_| self.plain)?;
        let (name, kind) = question.split_at_checked(question.len().checked_sub(4)?)?;
        let edns = self
            .edns
            .map_or([0; 3], |edns| [1, edns.version, edns.dnssec.into()]);
        let mut key = vec![bytes[2] & RD, bytes[3] & AD_CD];
        key.extend_from_slice(&edns);
        key.extend_from_slice(kind);
        key.extend(name.iter().map(u8::to_ascii_lowercase));
        Some(key.into())
    }
}

const FORMAT: ResponseCode = ResponseCode::FormErr;

/// Whether the answer is one to the query that was sent as `sent`: its id, its question, a response.
pub fn answers(sent: &[u8], query: &Query, answer: &[u8]) -> bool {
    let (Some(asked), Some(head)) = (sent.get(query.question.clone()), answer.get(..HEADER)) else {
        return false;
    };
    // The same id, a response, the same opcode (which is zero).
    if head[..2] != sent[..2] || head[2] & 0xf8 != QR {
        return false;
    }
    match u16::from_be_bytes([head[4], head[5]]) {
        // A server that can't read a query can't repeat it.
        0 => matches!(rcode(answer), 1 | 4 | 5),
        1 => answer.get(query.question.clone()).is_some_and(|echoed| {
            let (name, kind) = echoed.split_at(echoed.len() - 4);
            name.eq_ignore_ascii_case(&asked[..asked.len() - 4])
                && kind == &asked[asked.len() - 4..]
        }),
        _ => false,
    }
}

pub fn set_id(message: &mut [u8], id: u16) {
    message[..2].copy_from_slice(&id.to_be_bytes());
}

pub fn rcode(answer: &[u8]) -> u8 {
    answer.get(3).map_or(0, |byte| byte & 0x0f)
}

pub fn is_truncated(answer: &[u8]) -> bool {
    answer.get(2).is_some_and(|byte| byte & TC != 0)
}

/// The same answer without its records, and the hint to ask over TCP.
pub fn truncated(answer: &[u8], query: &Query) -> Vec<u8> {
    let mut short = answer[..query.question.end.min(answer.len())].to_vec();
    short[2] |= TC;
    short[6..HEADER].fill(0);
    short
}

/// TTL of the shortest-lived record, or, where a name or type isn't there, of its SOA (RFC 2308).
/// None for what mustn't be kept.
pub fn lifetime(answer: &[u8], query: &Query) -> Option<Lifetime> {
    const NXDOMAIN: u8 = 3;
    let code = rcode(answer);
    if is_truncated(answer) || (code != 0 && code != NXDOMAIN) {
        return None;
    }
    let count = |at: usize| usize::from(u16::from_be_bytes([answer[at], answer[at + 1]]));
    let (answers, authorities) = (count(6), count(8));
    let (records, end) = records(
        answer,
        query.question.end,
        answers + authorities + count(10),
    )?;
    if end != answer.len() {
        return None;
    }
    let of_type = |record: &Record| record.kind == u16::from(query.kind);
    let found = records[..answers].iter().any(of_type);
    let soa = records[answers..answers + authorities]
        .iter()
        .find(|record| record.kind == SOA);
    let negative = match soa {
        _ if found => u32::MAX,
        Some(soa) => {
            // MINIMUM is the last field of an SOA.
            let minimum = answer.get(soa.data.clone())?.last_chunk::<4>()?;
            soa.ttl.min(u32::from_be_bytes(*minimum))
        }
        None => return None,
    };
    let aging: Vec<_> = records.iter().filter(|r| r.kind != OPT).collect();
    let seconds = aging.iter().map(|r| r.ttl).min()?.min(negative);
    // A TTL with its highest bit set counts as none (RFC 2181 section 8).
    if seconds == 0 || seconds > i32::MAX as u32 {
        return None;
    }
    let ttls = aging.iter().map(|r| u16::try_from(r.ttl_at));
    Some(Lifetime {
        seconds,
        ttls: ttls.collect::<Result<_, _>>().ok()?,
    })
}

/// A kept answer for another client: its id, its spelling, and the seconds that have passed.
pub fn renewed(answer: &[u8], ttls: &[u16], age: u32, asked: &[u8], query: &Query) -> Vec<u8> {
    let mut renewed = answer.to_vec();
    set_id(&mut renewed, query.id);
    renewed[query.question.clone()].copy_from_slice(&asked[query.question.clone()]);
    for at in ttls {
        let at = usize::from(*at);
        if let Some(ttl) = renewed
            .get_mut(at..)
            .and_then(|rest| rest.first_chunk_mut::<4>())
        {
            *ttl = u32::from_be_bytes(*ttl).saturating_sub(age).to_be_bytes();
        }
    }
    renewed
}

/// `count` records from `at` on, and where they end. None where the bytes don't hold them.
fn records(bytes: &[u8], mut at: usize, count: usize) -> Option<(Vec<Record>, usize)> {
    // A record has eleven bytes at least: the count is the sender's word only.
    let mut found = Vec::with_capacity(count.min(bytes.len() / 11));
    for _ in 0..count {
        let (fixed, _) = label_end(bytes, at)?;
        let &[k0, k1, c0, c1, t0, t1, t2, t3, l0, l1] = bytes.get(fixed..)?.first_chunk()?;
        let start = fixed + 10;
        let end = start + usize::from(u16::from_be_bytes([l0, l1]));
        if end > bytes.len() {
            return None;
        }
        found.push(Record {
            kind: u16::from_be_bytes([k0, k1]),
            class: u16::from_be_bytes([c0, c1]),
            ttl: u32::from_be_bytes([t0, t1, t2, t3]),
            ttl_at: fixed + 4,
            data: start..end,
        });
        at = end;
    }
    Some((found, at))
}

/// What follows a name that begins at `at`, and whether it is written without a pointer.
fn label_end(bytes: &[u8], mut at: usize) -> Option<(usize, bool)> {
    loop {
        match *bytes.get(at)? {
            0 => return Some((at + 1, true)),
            length @ 1..=63 => at += 1 + usize::from(length),
            192.. => return Some((at + 2, false)),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &[u8] = b"\x07example\x03Com\x00\x00\x01\x00\x01";

    fn query(extra: &[u8], additionals: u8) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, additionals];
        bytes.extend_from_slice(EXAMPLE);
        bytes.extend_from_slice(extra);
        bytes
    }

    /// The query's answer with these (section counts, records).
    fn answer(counts: [u8; 3], rcode: u8, records: &[u8]) -> Vec<u8> {
        let [an, ns, ar] = counts;
        let mut bytes = vec![0x12, 0x34, 0x81, 0x80 | rcode, 0, 1, 0, an, 0, ns, 0, ar];
        bytes.extend_from_slice(EXAMPLE);
        bytes.extend_from_slice(records);
        bytes
    }

    const OPT_DO: &[u8] = b"\x00\x00\x29\x04\xd0\x00\x00\x80\x00\x00\x00";
    const COOKIE: &[u8] = b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x0c\x00\x0a\x00\x0812345678";

    #[test]
    fn edns_and_what_makes_an_answer_private_are_seen() {
        let bare = Query::parse(&query(b"", 0)).unwrap();
        assert_eq!((bare.edns, bare.plain, bare.payload()), (None, true, 512));
        assert_eq!(bare.question, 12..29);
        let edns = Query::parse(&query(OPT_DO, 1)).unwrap();
        let expected = Edns {
            payload: 1232,
            version: 0,
            dnssec: true,
        };
        assert_eq!((edns.edns, edns.plain), (Some(expected), true));
        let cookie = query(COOKIE, 1);
        assert_eq!(Query::parse(&cookie).unwrap().key(&cookie), None);
        let more = query(b"junk", 0);
        assert_eq!(Query::parse(&more).unwrap().key(&more), None);
    }

    #[test]
    fn a_key_holds_flags_and_question_but_no_spelling() {
        let key = |bytes: &[u8]| Query::parse(bytes).unwrap().key(bytes).unwrap();
        let lower = query(b"", 0).to_ascii_lowercase();
        assert_eq!(key(&lower), key(&query(b"", 0)));
        assert_ne!(key(&lower), key(&query(OPT_DO, 1)));
        let mut checking_disabled = lower.clone();
        checking_disabled[3] |= 0x10;
        assert_ne!(key(&lower), key(&checking_disabled));
    }

    #[test]
    fn what_is_no_query_is_told_so() {
        let refused = |bytes: &[u8]| Query::parse(bytes).unwrap_err();
        assert_eq!(refused(b"\x00\x01"), Unusable::Drop);
        let with = |at: usize, value: u8| {
            let mut bytes = query(b"", 0);
            bytes[at] = value;
            refused(&bytes)
        };
        let malformed = || Unusable::Refuse(ResponseCode::FormErr);
        assert_eq!(with(2, 0x80), malformed());
        assert_eq!(with(2, 0x28), Unusable::Refuse(ResponseCode::NotImp));
        assert_eq!(with(5, 2), malformed());
        assert_eq!(with(5, 0), malformed());
        assert_eq!(with(11, 1), malformed());
        assert_eq!(refused(&query(b"", 0)[..20]), malformed());
    }

    #[test]
    fn an_answer_has_the_id_and_the_question_in_any_spelling() {
        let sent = query(b"", 0);
        let asked = Query::parse(&sent).unwrap();
        let good = answer([0; 3], 3, b"");
        assert!(answers(&sent, &asked, &good));
        assert!(answers(&sent, &asked, &good.to_ascii_uppercase()));
        for at in [0, 1, 2, 5, 15, 26, 28] {
            let mut other = good.clone();
            other[at] ^= 1;
            if at == 2 {
                other[at] = 1;
            }
            assert!(!answers(&sent, &asked, &other), "byte {at}");
        }
        assert!(!answers(&sent, &asked, &good[..20]));
        let refused = b"\x12\x34\x81\x85\x00\x00\x00\x00\x00\x00\x00\x00";
        assert!(answers(&sent, &asked, refused));
    }

    #[test]
    fn an_answer_lives_as_long_as_its_shortest_record_or_its_soa() {
        let sent = query(b"", 0);
        let asked = Query::parse(&sent).unwrap();
        let a = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x01\x02\x03\x04";
        let soa = b"\xc0\x0c\x00\x06\x00\x01\x00\x00\x01\x00\x00\x16\x00\x00\
            \0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0\x1e";
        let life = |bytes: &[u8]| lifetime(bytes, &asked).map(|life| life.seconds);
        assert_eq!(life(&answer([1, 0, 0], 0, a)), Some(60));
        assert_eq!(life(&answer([0, 1, 0], 3, soa)), Some(30));
        assert_eq!(life(&answer([0, 1, 0], 0, soa)), Some(30));
        assert_eq!(life(&answer([0; 3], 3, b"")), None);
        assert_eq!(life(&answer([1, 0, 0], 2, a)), None);
        assert_eq!(life(&answer([2, 0, 0], 0, a)), None);
        let with_opt = [a.as_slice(), OPT_DO].concat();
        let kept = answer([1, 0, 1], 0, &with_opt);
        let life = lifetime(&kept, &asked).unwrap();
        let mut later = query(OPT_DO, 1).to_ascii_lowercase();
        later[0] = 0x99;
        let again = Query::parse(&later).unwrap();
        let renewed = renewed(&kept, &life.ttls, 20, &later, &again);
        assert_eq!(renewed[..2], [0x99, 0x34]);
        assert_eq!(
            renewed[again.question.clone()],
            later[again.question.clone()]
        );
        assert_eq!(renewed[35..39], [0, 0, 0, 40]);
        assert_eq!(&renewed[renewed.len() - OPT_DO.len()..], OPT_DO);
    }
}
