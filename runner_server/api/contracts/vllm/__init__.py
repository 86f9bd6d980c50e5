"""Worker protocol of vLLM behind a gateway, ``vllm.grpc.engine.VllmEngine``, on the same engine.

The extra ``smg`` installs the stubs, which the rest of the server does not need.
"""
