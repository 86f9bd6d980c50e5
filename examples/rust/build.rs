//! Generates the client from the protocol, with protox instead of protoc.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../proto/mlxrunner/v1/runner.proto");
    let files = protox::compile(["mlxrunner/v1/runner.proto"], ["../../proto"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(files)?;
    Ok(())
}
