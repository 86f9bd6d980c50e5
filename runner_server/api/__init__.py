"""The RPC services, which validate requests, run them on the engine and encode the output."""
