"""HTTP interfaces of other servers, for a runner or a pool.

A request is translated to a message of ``mlxrunner.v1``, answered by a :class:`Host`, and the
messages of the answer are translated back. Needs the extra ``http``, so nothing else imports
this room.
"""
