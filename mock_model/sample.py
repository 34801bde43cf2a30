"""A JSON value that fits a JSON schema: the arguments of a tool call, or a structured answer."""

from typing import Any

MAX_DEPTH = 12
_PLAIN: dict[str, Any] = {"string": "text", "integer": 1, "number": 1.5, "boolean": True, "null": None}


def sample(schema: Any, root: Any = None, depth: int = 0) -> Any:  # noqa: ANN401
    """Return a value for `schema`, always the same; an empty object where the schema is not understood."""
    root = schema if root is None else root
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return {}
    if "const" in schema:
        return schema["const"]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    if isinstance(schema.get("$ref"), str):
        return sample(_resolve(schema["$ref"], root), root, depth + 1)
    for branches in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        if isinstance(branches, list) and branches:
            return sample(branches[0], root, depth + 1)
    return _of_type(schema, root, depth)


def _of_type(schema: dict[str, Any], root: Any, depth: int) -> Any:  # noqa: ANN401
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind == "array":
        return [sample(schema.get("items"), root, depth + 1)]
    if isinstance(kind, str) and kind in _PLAIN:
        return _PLAIN[kind]
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    required = schema.get("required")
    names = [name for name in properties if not isinstance(required, list) or name in required]
    return {name: sample(properties[name], root, depth + 1) for name in names}


def _resolve(reference: str, root: Any) -> Any:  # noqa: ANN401
    value = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return value
