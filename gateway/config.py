"""Backends and routes: from the file `GATEWAY_CONFIG` (YAML), or from `GATEWAY_BACKEND_URLS` without one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from gateway.settings import SettingsError, check_url, secret

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gateway.settings import Settings

PROBE_PATH = "/health"
_NO = {"false", "no", "off"}


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """One url of a backend. `probe` is the path of its health check, or None for none."""

    name: str
    url: str
    api_key: str | None
    probe: str | None


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """A server we forward to: one or more replicas."""

    name: str
    replicas: tuple[ReplicaConfig, ...]


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """A backend and the model to ask it for; None keeps the caller's."""

    backend: str
    model: str | None


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """A model name (or `*`) and its targets, in order."""

    model: str
    targets: tuple[TargetConfig, ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """All backends and routes; the first route that matches a model wins."""

    backends: tuple[BackendConfig, ...]
    routes: tuple[RouteConfig, ...]


def load_routing(settings: "Settings") -> Routing:
    """Return the routing of these settings.

    Raises:
        SettingsError: the file is invalid; the message has line and key.
    """
    if settings.gateway_config is not None:
        return _from_file(settings.gateway_config)
    key = settings.gateway_backend_api_key
    api_key = key.get_secret_value() if key else None
    if api_key is not None and not _fits_a_header(api_key):
        raise SettingsError("GATEWAY_BACKEND_API_KEY=(hidden) is not valid: it must be visible ASCII characters")
    replicas = tuple(
        ReplicaConfig(f"backend-{n}", url, api_key, PROBE_PATH)
        for n, url in enumerate(settings.gateway_backend_urls, 1)
    )
    return Routing(
        backends=(BackendConfig("backend", replicas),),
        routes=(RouteConfig("*", (TargetConfig("backend", None),)),),
    )


def _from_file(path: "Path") -> Routing:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise SettingsError(
            f"GATEWAY_CONFIG={str(path)!r}: {error.strerror}; it must be the path of a readable YAML file"
        ) from None
    except RecursionError:
        raise SettingsError(f"GATEWAY_CONFIG={str(path)!r}: it is nested too deep") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML in UTF-8"
        raise SettingsError(f"GATEWAY_CONFIG={str(path)!r}{line}: {problem}") from None
    return _File(path).routing(root)


class _File:
    """Walks the nodes of the file: every complaint has its line and key."""

    def __init__(self, path: "Path") -> None:
        self._path = path

    def routing(self, root: yaml.Node | None) -> Routing:
        if root is None:
            raise SettingsError(
                f"GATEWAY_CONFIG={str(self._path)!r}: the file is empty; it needs the keys backends and routes"
            )
        top = self._mapping(root, "the file", {"backends", "routes"}, required=("backends", "routes"))
        nodes = self._mapping(top["backends"], "backends", None)
        backends = tuple(self._backend(name, node) for name, node in nodes.items())
        if not backends:
            raise self._wrong(top["backends"], "backends", "needs at least one backend")
        self._distinct_replicas(nodes, backends)
        known = {backend.name for backend in backends}
        routes = tuple(
            self._route(node, f"routes[{n}]", known) for n, node in enumerate(self._list(top["routes"], "routes"))
        )
        return Routing(backends, routes)

    def _backend(self, name: str, node: yaml.Node) -> BackendConfig:
        key = f"backends.{name}"
        if not name or not all(c.isalnum() or c in "-_." for c in name) or not name.isascii():
            raise self._wrong(node, key, "a backend's name consists of letters, digits, '-', '_' and '.'")
        items = self._mapping(node, key, {"url", "urls", "api_key_env", "probe"})
        if ("url" in items) == ("urls" in items):
            raise self._wrong(node, key, "needs exactly one of url and urls")
        api_key = self._api_key(items.get("api_key_env"), f"{key}.api_key_env")
        probe = self._probe(items.get("probe"), f"{key}.probe")
        if "url" in items:
            url = self._url(items["url"], f"{key}.url")
            return BackendConfig(name, (ReplicaConfig(name, url, api_key, probe),))
        urls = [self._url(item, f"{key}.urls[{n}]") for n, item in enumerate(self._list(items["urls"], f"{key}.urls"))]
        return BackendConfig(
            name, tuple(ReplicaConfig(f"{name}-{n}", url, api_key, probe) for n, url in enumerate(urls, 1))
        )

    def _route(self, node: yaml.Node, key: str, known: set[str]) -> RouteConfig:
        items = self._mapping(node, key, {"model", "targets"}, required=("model", "targets"))
        targets = tuple(
            self._target(item, f"{key}.targets[{n}]", known)
            for n, item in enumerate(self._list(items["targets"], f"{key}.targets"))
        )
        return RouteConfig(self._text(items["model"], f"{key}.model"), targets)

    def _target(self, node: yaml.Node, key: str, known: set[str]) -> TargetConfig:
        items = self._mapping(node, key, {"backend", "model"}, required=("backend",))
        backend = self._text(items["backend"], f"{key}.backend")
        if backend not in known:
            raise self._wrong(
                items["backend"],
                f"{key}.backend",
                f"there is no backend {backend!r}; there are: {', '.join(sorted(known))}",
            )
        return TargetConfig(backend, self._text(items["model"], f"{key}.model") if "model" in items else None)

    def _distinct_replicas(self, nodes: dict[str, yaml.Node], backends: "Iterable[BackendConfig]") -> None:
        seen: set[str] = set()
        for backend in backends:
            for replica in backend.replicas:
                if replica.name in seen:
                    node, key = nodes[backend.name], f"backends.{backend.name}"
                    raise self._wrong(node, key, f"two replicas would be called {replica.name!r}")
                seen.add(replica.name)

    def _api_key(self, node: yaml.Node | None, key: str) -> str | None:
        if node is None:
            return None
        name = self._text(node, key)
        value = secret(name)
        if value is None:
            raise self._wrong(node, key, f"neither {name} nor {name}_FILE is set in the environment")
        if not _fits_a_header(value):
            raise self._wrong(node, key, f"the value of {name} must be visible ASCII characters")
        return value

    def _probe(self, node: yaml.Node | None, key: str) -> str | None:
        if node is None:
            return PROBE_PATH
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:bool" and node.value.lower() in _NO:
            return None
        path = self._text(node, key)
        if not path.startswith("/"):
            raise self._wrong(node, key, f"must be a path that begins with '/', or false; got {path!r}")
        return path

    def _url(self, node: yaml.Node, key: str) -> str:
        url = self._text(node, key)
        try:
            return check_url(url)
        except ValueError as error:
            raise self._wrong(node, key, str(error)) from None

    def _text(self, node: yaml.Node, key: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str" or not node.value:
            raise self._wrong(node, key, "needs a text that is not empty")
        return str(node.value)

    def _list(self, node: yaml.Node, key: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self._wrong(node, key, "needs a list with at least one entry")
        return list(node.value)

    def _mapping(
        self, node: yaml.Node, key: str, allowed: set[str] | None, required: tuple[str, ...] = ()
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, key, "needs a mapping")
        items: dict[str, yaml.Node] = {}
        for name_node, value in node.value:
            name = str(name_node.value)
            if name in items:
                raise self._wrong(name_node, f"{key}: {name}", "the key occurs twice")
            if allowed is not None and name not in allowed:
                raise self._wrong(name_node, f"{key}: {name}", f"unknown key; allowed: {', '.join(sorted(allowed))}")
            items[name] = value
        for name in required:
            if name not in items:
                raise self._wrong(node, key, f"the key {name!r} is missing")
        return items

    def _wrong(self, node: yaml.Node, key: str, message: str) -> SettingsError:
        return SettingsError(f"GATEWAY_CONFIG={str(self._path)!r}, line {node.start_mark.line + 1}, {key}: {message}")


def _fits_a_header(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key
