"""The RPC services: they validate requests, submit them to the engine and encode the output."""
