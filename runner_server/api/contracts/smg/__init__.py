"""Worker protocol of the SMG gateway, ``mlx.grpc.engine.MlxEngine``, on the same engine.

The extra ``smg`` installs the stubs, which the rest of the server does not need.
"""
