"""JSON schemas of Python types, and values of these types from JSON. Pydantic does both.

Pydantic is imported when a type is used, so that the library works without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

from runner_client.checks import refuse_type
from runner_client.errors import NotSupportedError
from runner_common.extras import install_advice

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema
    from pydantic_core import core_schema

T = TypeVar("T")


def schema_of(field: str, source: Mapping[str, object] | type[Any]) -> Mapping[str, object]:
    """Return a JSON schema: a mapping as it is, or the schema of a type.

    Args:
        field: Name of the argument, for errors.
        source: The schema, or a Pydantic model, a dataclass, or a type made of these.

    Raises:
        TypeError: The source is neither, or the type has no JSON schema.
        NotSupportedError: The source is a type, and Pydantic is not installed.
    """
    if isinstance(source, Mapping):
        return source
    if not _is_type(source):
        refuse_type(
            field, source, "a mapping with a JSON schema, or a type such as a Pydantic model"
        )
    adapter = _adapter(source)

    from pydantic import PydanticUserError  # noqa: PLC0415 - optional

    try:
        return adapter.json_schema(schema_generator=_generator())
    except PydanticUserError as error:
        raise TypeError(f"{field}: {_name(source)} has no JSON schema: {error.message}") from error


def value_of(kind: type[T], text: str) -> T:
    """Convert JSON text to a value of a type.

    Raises:
        ValueError: The text is not such a value; a ``pydantic.ValidationError``.
        TypeError: Pydantic does not know the type.
        NotSupportedError: Pydantic is not installed.
    """
    # Before 2.14, Pydantic's schemas have aliases even where a model reads names only, and a
    # property that the model does not know would be dropped silently.
    return _adapter(kind).validate_json(text, by_alias=True, by_name=True)


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    try:
        from pydantic import (  # noqa: PLC0415 - optional
            PydanticUndefinedAnnotation,
            PydanticUserError,
            TypeAdapter,
        )
    except ModuleNotFoundError as error:
        raise NotSupportedError(
            f"{_name(kind)} as a schema needs Pydantic: {install_advice('pydantic')}, or write the "
            "JSON schema as a mapping and read the text with json.loads"
        ) from error
    try:
        adapter = TypeAdapter(kind)
        adapter.rebuild()
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        problem = error.message.partition("\n")[0]
        raise TypeError(f"{_name(kind)} is not a type for Pydantic: {problem}") from error
    return adapter


def _is_type(value: object) -> bool:
    return isinstance(value, type) or get_origin(value) is not None


def _name(kind: type[Any]) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


@cache
def _generator() -> type[GenerateJsonSchema]:
    """Return Pydantic's generator of schemas, made stricter for a model that writes by them."""
    from pydantic.json_schema import GenerateJsonSchema  # noqa: PLC0415 - optional

    class Generator(GenerateJsonSchema):
        """Generator of schemas without properties and texts that Pydantic drops or refuses."""

        def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
            return _closed(super().model_schema(schema))

        def dataclass_schema(self, schema: core_schema.DataclassSchema) -> dict[str, Any]:
            return _closed(super().dataclass_schema(schema))

        def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> dict[str, Any]:
            return _closed(super().typed_dict_schema(schema))

        def decimal_schema(self, schema: core_schema.DecimalSchema) -> dict[str, Any]:
            # The other part is any string, or a pattern with look-around, which servers refuse.
            whole = super().decimal_schema(schema)
            return next(part for part in whole["anyOf"] if part["type"] == "number")

    return Generator


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Forbid properties without a field, unless the class takes some.

    Pydantic drops them by default. A model could write them until its tokens are spent.
    """
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema
