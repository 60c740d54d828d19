//! The numbered reasons of the kernel side, by name: read from its header when this is built.

include!(concat!(env!("OUT_DIR"), "/reasons.rs"));

/// How often one exit of the programs was taken since they were first loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason {
    pub number: u32,
    /// As in the header, in lower case.
    pub name: &'static str,
    pub text: &'static str,
    pub count: u64,
}
