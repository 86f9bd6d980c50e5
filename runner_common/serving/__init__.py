"""Parts of a gRPC server: address, TLS, tokens, errors, reflection, and the end of the process."""
