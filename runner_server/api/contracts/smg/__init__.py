"""The worker protocol of the SMG gateway, ``mlx.grpc.engine.MlxEngine``, on the same engine.

Its messages come with the extra ``smg``; nothing else of the server needs them.
"""
