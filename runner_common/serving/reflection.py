"""Server reflection, v1 and v1alpha, for grpcurl and similar tools."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet, SourceCodeInfo
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

_V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Add server reflection, which describes some services and itself.

    Args:
        server: A server that has not started yet.
        services: Full names of the services.
    """
    names = (*services, reflection.SERVICE_NAME, _V1)
    pool: Any = _SymbolPool()
    servicer = reflection.aio.ReflectionServicer(names, pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    # v1 differs from v1alpha only in its name, and grpcio-reflection serves only the latter.
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(_V1, {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((generic,))


class _SymbolPool:
    """Proxy of the default descriptor pool that finds methods and fields, and adds comments.

    Python's pool finds only messages, services and enums, so that
    ``grpcurl describe mlxrunner.v1.RunnerService.Load`` would fail. Generated code has no comments,
    although they are the specification of this protocol.
    """

    def __init__(self) -> None:
        self._pool: Any = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of the pool
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> _CommentedFile:  # noqa: N802 - the pool's
        try:
            file = self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            file = self._pool.FindFileContainingSymbol(symbol.rpartition(".")[0])
        return self._commented(file)

    def FindFileByName(self, name: str) -> _CommentedFile:  # noqa: N802 - the pool's
        return self._commented(self._pool.FindFileByName(name))

    def _commented(self, file: FileDescriptor) -> _CommentedFile:
        return _CommentedFile(file, self._comments.get(file.name))

    @cached_property
    def _comments(self) -> dict[str, SourceCodeInfo]:
        data = (resources.files("mlxrunner.v1") / "runner.protoset").read_bytes()
        files = FileDescriptorSet.FromString(data).file
        return {file.name: file.source_code_info for file in files}


class _CommentedFile:
    """The part of a file descriptor used by reflection, with the comments of the source."""

    def __init__(self, file: FileDescriptor, comments: SourceCodeInfo | None) -> None:
        self._file = file
        self._comments = comments
        self.name = file.name
        self.dependencies = file.dependencies

    def CopyToProto(self, proto: FileDescriptorProto) -> None:  # noqa: N802 - the descriptor's
        self._file.CopyToProto(proto)
        if self._comments:
            proto.source_code_info.CopyFrom(self._comments)
