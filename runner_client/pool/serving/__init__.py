"""The server of a pool: `RunnerService` for all of its models, and `PoolService`.

Needs the packages of the extra ``server`` for health checks and reflection, so nothing else imports
this room.
"""
