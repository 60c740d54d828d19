//! The types of the kernel side's objects, as far as layouts need them (linux/btf.h).

use std::collections::BTreeMap;

/// One object file's `.BTF`.
pub(super) struct Btf {
    types: Vec<Type>,
}

#[derive(Debug)]
struct Type {
    name: String,
    kind: u32,
    /// Bytes, or the number of the type that this one is made of: by kind.
    size: u32,
    members: Vec<Member>,
    array: Option<(u32, u32)>,
}

#[derive(Debug)]
struct Member {
    name: String,
    of: u32,
    bits: u32,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Map {
    pub key: usize,
    pub value: usize,
    /// 0: not said.
    pub entries: u32,
}

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

impl Btf {
    pub fn of(object: &[u8]) -> Self {
        let data = section(object, ".BTF");
        let header = word(data, 4) as usize;
        let begin = header + word(data, 8) as usize;
        let end = begin + word(data, 12) as usize;
        let strings = &data[header + word(data, 16) as usize..];
        // 0 is void.
        let mut types = vec![Type {
            name: String::new(),
            kind: 0,
            size: 0,
            members: Vec::new(),
            array: None,
        }];
        let mut at = begin;
        while at < end {
            let (info, size) = (word(data, at + 4), word(data, at + 8));
            let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
            let name = text(strings, word(data, at));
            at += 12;
            let mut made = Type {
                name,
                kind,
                size,
                members: Vec::new(),
                array: None,
            };
            let each = match kind {
                INT | VAR | DECL_TAG => 4 / count.max(1),
                ARRAY => 12 / count.max(1),
                STRUCT | UNION | DATASEC | ENUM64 => 12,
                ENUM | FUNC_PROTO => 8,
                _ => 0,
            };
            match kind {
                ARRAY => made.array = Some((word(data, at), word(data, at + 8))),
                STRUCT => {
                    let fields = data[at..at + 12 * count].chunks(12);
                    made.members.extend(fields.map(|field| Member {
                        name: text(strings, word(field, 0)),
                        of: word(field, 4),
                        bits: word(field, 8),
                    }));
                }
                _ => {}
            }
            at += each * count.max(usize::from(matches!(kind, INT | VAR | DECL_TAG | ARRAY)));
            types.push(made);
        }
        Self { types }
    }

    /// Offset and size of each field of `struct NAME`, and its own size.
    pub fn layout(&self, name: &str) -> (BTreeMap<&str, (usize, usize)>, usize) {
        let is = |made: &&Type| made.kind == STRUCT && made.name == name;
        let found = self.types.iter().find(is);
        let found = found.unwrap_or_else(|| panic!("struct {name} is in no map"));
        let field = |one| self.field(one);
        (
            found.members.iter().map(field).collect(),
            found.size as usize,
        )
    }

    fn field<'a>(&self, member: &'a Member) -> (&'a str, (usize, usize)) {
        (
            member.name.as_str(),
            (member.bits as usize / 8, self.size(member.of)),
        )
    }

    /// Bytes that no field of the type covers, here or deeper.
    pub fn holes(&self, number: u32) -> usize {
        let made = self.plain(number);
        let covered: usize = made.members.iter().map(|m| self.size(m.of)).sum();
        let deeper: usize = made.members.iter().map(|m| self.holes(m.of)).sum();
        match made.kind {
            STRUCT => made.size as usize - covered + deeper,
            _ => 0,
        }
    }

    pub fn maps(&self) -> BTreeMap<&str, Map> {
        let maps = self.definitions();
        maps.map(|(name, fields)| {
            let target = |field: &str| self.pointed(fields, field);
            let size = |field| target(field).map_or(0, |of| self.size(of));
            let map = Map {
                key: size("key"),
                value: size("value"),
                entries: target("max_entries")
                    .and_then(|of| self.types[of as usize].array)
                    .map_or(0, |(_, count)| count),
            };
            (name, map)
        })
        .collect()
    }

    /// The type of a map's keys.
    pub fn key(&self, map: &str) -> Option<u32> {
        let (_, fields) = self.definitions().find(|(name, _)| *name == map)?;
        self.pointed(fields, "key")
    }

    /// Variables of an anonymous structure with a `type`.
    fn definitions(&self) -> impl Iterator<Item = (&str, &[Member])> {
        let variables = self.types.iter().filter(|made| made.kind == VAR);
        variables.filter_map(|variable| {
            let fields = &self.plain(variable.size).members;
            let is_map = fields.iter().any(|field| field.name == "type");
            is_map.then_some((variable.name.as_str(), fields.as_slice()))
        })
    }

    fn pointed(&self, fields: &[Member], name: &str) -> Option<u32> {
        let field = fields.iter().find(|field| field.name == name)?;
        Some(self.types[field.of as usize].size)
    }

    fn size(&self, number: u32) -> usize {
        let made = self.plain(number);
        match (made.kind, made.array) {
            (PTR, _) => 8,
            (_, Some((of, count))) => self.size(of) * count as usize,
            _ => made.size as usize,
        }
    }

    /// Without names and qualifiers: typedef, volatile, const.
    fn plain(&self, number: u32) -> &Type {
        let made = &self.types[number as usize];
        match made.kind {
            8..=11 => self.plain(made.size),
            _ => made,
        }
    }
}

/// Of an ELF file of this machine's order (elf.h, Elf64_Ehdr and Elf64_Shdr).
fn section<'a>(object: &'a [u8], name: &str) -> &'a [u8] {
    let table = long(object, 0x28);
    let short = |at: usize| usize::from(u16::from_ne_bytes([object[at], object[at + 1]]));
    let (size, count, names) = (short(0x3a), short(0x3c), short(0x3e));
    let header = |at: usize| &object[table + at * size..];
    let content = |header: &[u8]| &object[long(header, 0x18)..][..long(header, 0x20)];
    let names = content(header(names));
    let found = (0..count)
        .map(header)
        .find(|header| text(names, word(header, 0)) == name);
    content(found.unwrap_or_else(|| panic!("the object has no {name}")))
}

fn word(data: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(data[at..at + 4].try_into().unwrap())
}

fn long(data: &[u8], at: usize) -> usize {
    u64::from_ne_bytes(data[at..at + 8].try_into().unwrap()) as usize
}

fn text(strings: &[u8], at: u32) -> String {
    let rest = &strings[at as usize..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(rest[..end].to_vec()).unwrap()
}
