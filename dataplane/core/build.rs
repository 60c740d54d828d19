//! Generates the wire types from `proto/` at the top of the tree and compiles the kernel side from
//! `bpf/`, so neither can be stale.

use std::path::{Path, PathBuf};
use std::process::Command;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const PROGRAMS: [&str; 10] = [
    "connect",
    "datagram",
    "egress",
    "getsockopt",
    "lookup",
    "names",
    "sock_create",
    "sockops_dataplane",
    "sockops_kubelet",
    "sockops_pods",
];

#[allow(clippy::disallowed_methods)] // cargo tells a build script by its environment alone
fn main() -> Result<()> {
    wire()?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let sources = Path::new("../../bpf");
    println!("cargo:rerun-if-changed={}", sources.display());
    for program in PROGRAMS {
        compile(&sources.join(program).with_extension("c"), &out)?;
    }
    let header = std::fs::read_to_string(sources.join("include/reasons.h"))?;
    std::fs::write(out.join("reasons.rs"), reasons(&header)?)?;
    Ok(())
}

/// One object, with the types of its maps (`-g`).
fn compile(source: &Path, out: &Path) -> Result<()> {
    let name = source.with_extension("o");
    let object = out.join(name.file_name().ok_or("a source has a name")?);
    let multiarch = format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    let status = Command::new("clang")
        .args([
            "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror",
        ])
        .arg(multiarch)
        .arg("-c")
        .arg(source)
        .arg("-o")
        .arg(&object)
        .status()
        .map_err(|error| format!("clang: {error}; install clang and libbpf-dev"))?;
    if !status.success() {
        return Err(format!("clang: {} doesn't compile", source.display()).into());
    }
    Ok(())
}

/// `REASON_NAME = 7, /* text */` becomes `(7, "name", "text")`.
fn reasons(header: &str) -> Result<String> {
    let mut rows = String::new();
    for line in header.lines() {
        let Some(rest) = line.trim().strip_prefix("REASON_") else {
            continue;
        };
        let (name, rest) = rest.split_once(" = ").ok_or("a reason has a number")?;
        let (number, text) = rest.split_once(", /* ").ok_or("a reason has a text")?;
        let text = text.trim_end_matches(" */");
        rows += &format!("    ({number}, {:?}, {text:?}),\n", name.to_lowercase());
    }
    Ok(format!(
        "/// Number, name, text.\npub(super) const REASONS: &[(u32, &str, &str)] = &[\n{rows}];\n"
    ))
}

fn wire() -> Result<()> {
    let root = "../..";
    let files = [
        "proto/workload.proto",
        "proto/authorization.proto",
        "proto/discovery.proto",
        "proto/control.proto",
        "proto/otlp.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={root}/{file}");
    }
    let descriptors = protox::compile(files, [root])?;
    prost_build::Config::new()
        .bytes(["."])
        .btree_map(["."])
        .compile_fds(descriptors)?;
    Ok(())
}
