//! Generates the wire types from `proto/` at the top of the tree, so they can't be stale.

fn main() -> Result<(), Box<dyn std::error::Error>> {
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
