//! Compiles the wire contract with protox, so that a build needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let contract = protox::compile(["proto/vz/agent/v1/agent.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        // Sorted, so that equal messages are encoded alike.
        .btree_map(".")
        .bytes(".")
        .compile_fds(contract)?;
    Ok(())
}
