//! What a running process tells of how it was made (facts ztunnel 13.1, `version`).

// Cargo speaks to build scripts by the environment.
#![expect(clippy::disallowed_methods)]

use std::path::Path;
use std::process::Command;

fn main() {
    let rustc = std::env::var("RUSTC").unwrap_or_default();
    let unknown = || "unknown".to_owned();
    let rust = said(&rustc, &["--version"]).unwrap_or_else(unknown);
    let profile = std::env::var("PROFILE").unwrap_or_else(|_| unknown());
    // Of a source archive nothing is known, and that of a repository around it is another's.
    let revision = said("git", &["rev-parse", "HEAD"]).filter(|_| is_ours());
    let status = revision.as_ref().and_then(|_| {
        let changed = said("git", &["status", "--porcelain", "--untracked-files=no"])?;
        Some(
            if changed.is_empty() {
                "Clean"
            } else {
                "Modified"
            }
            .to_owned(),
        )
    });
    for (name, value) in [
        ("REVISION", revision.unwrap_or_else(unknown)),
        ("RUST", rust),
        ("PROFILE", profile),
        ("STATUS", status.unwrap_or_else(unknown)),
    ] {
        println!("cargo:rustc-env=UNDERPASS_BUILD_{name}={value}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    // Written by every commit and change of branch.
    let log = said("git", &["rev-parse", "--git-path", "logs/HEAD"]).filter(|_| is_ours());
    if let Some(log) = log.filter(|log| Path::new(log).exists()) {
        println!("cargo:rerun-if-changed={log}");
    }
}

/// The repository is that of this tree.
fn is_ours() -> bool {
    said("git", &["rev-parse", "--show-prefix"]).is_some_and(|at| at == "dataplane/bin/")
}

fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
