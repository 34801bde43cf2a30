"""A configuration as a document, for people and for comparisons: secrets are left out on request."""

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from gateway.config import Routing

SECRET = frozenset({"api_key", "secret_headers", "query", "digest", "tls_digest", "user_info"})
"""Fields that are, or may be, secrets; some servers take their key in the query."""
SET = "(set)"
"""Stands for a secret."""
LEFT_OUT = frozenset({"tls", "admin_key", "limits_url"})
"""Fields that are not shown: a context of TLS says nothing."""


def document(routing: "Routing", *, with_secrets: bool = False) -> dict[str, Any]:
    """Return backends, routes and keys as JSON has them.

    Args:
        routing: the configuration.
        with_secrets: for a comparison, which tells nobody; else `(set)` stands for each of them.
    """
    shown: dict[str, Any] = _plain(routing, with_secrets=with_secrets)
    return shown


def _plain(value: object, *, with_secrets: bool) -> Any:  # noqa: ANN401 - JSON
    if is_dataclass(value):
        items = {each.name: getattr(value, each.name) for each in fields(value) if each.name not in LEFT_OUT}
        if "url" in items:
            items["url"], items["user_info"] = _without_user(items["url"])
        return {
            name: _plain(item, with_secrets=with_secrets) if with_secrets or name not in SECRET else _hidden(item)
            for name, item in items.items()
        }
    if isinstance(value, tuple):
        return [_plain(item, with_secrets=with_secrets) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _hidden(secret: object) -> object:
    """Return what may be shown of a secret: the names of several, and whether there is one."""
    if isinstance(secret, tuple):
        return [[name, SET] for name, _ in secret]
    return SET if secret is not None else None


def _without_user(url: str) -> tuple[str, str | None]:
    """Return a url without user info, and that."""
    parts = urlsplit(url)
    user, at, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=place)), user if at else None
