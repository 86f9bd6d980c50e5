//! Generates the typed stubs and keeps the descriptors, which know the JSON names.
use std::{env, error::Error, fs, path::Path};

use prost::Message;

const PROTO: &str = "../../../../proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTO}/mlxrunner/v1/runner.proto");
    let files = protox::compile(["mlxrunner/v1/runner.proto"], [PROTO])?;
    let descriptors = Path::new(&env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(descriptors, files.encode_to_vec())?;

    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds_with_config(files, config)?;
    Ok(())
}
