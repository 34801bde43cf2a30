"""Backends, routes and keys: from the file `GATEWAY_CONFIG` (YAML), or from the environment without one."""

import re
import ssl
from dataclasses import dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import yaml
from yaml.error import MarkedYAMLError
from yaml.reader import ReaderError

from gateway.files import Files
from gateway.headers import GATEWAY_NAMES
from gateway.settings import SettingsError, check_path, check_url, secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from pydantic import SecretStr

    from gateway.settings import Settings

SECRET_NAMES = frozenset({"authorization", "api-key", "cookie", "x-api-key"})
"""Headers that are secrets however their values are given."""
_NO = {"false", "no", "off"}
_TIMERS = ("connect", "first_token", "answer", "idle")
_TAG = "tag:yaml.org,2002:"
_WRITTEN = frozenset(f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "timestamp"))
MAX_VALUES = 100_000
"""In a file, with those that aliases repeat."""
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A header's name (RFC 9110, 5.6.2)."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: for a connection, a stream's first content event, an unstreamed answer, two reads of a body."""

    connect: float
    first_token: float
    answer: float
    idle: float


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """The health check of a replica: a path, the seconds it may take, the seconds between two."""

    path: str
    timeout: float
    interval: float


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """One url of a backend, and all that holds for it.

    Attributes:
        name: as in `x-gateway-backend`.
        url: as configured.
        timeouts: of its attempts.
        probe: its health check, or None for none.
        api_key: sent as `Authorization: Bearer`, or alone in the header `api_key_header`.
        headers: sent with every call and probe, names in lower case.
        secret_headers: the same, but never sent with probes.
        query: names and values added to the url of every call.
        max_in_flight: attempts at once, or None for any number.
        tls: for an `https://` url, or None for the usual checks.
        tls_digest: SHA-256 of the files that `tls` was made of, by which two of them are compared.
    """

    name: str
    url: str
    timeouts: Timeouts
    probe: ProbeConfig | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_header: str = "authorization"
    headers: tuple[tuple[str, str], ...] = ()
    secret_headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    query: tuple[tuple[str, str], ...] = ()
    max_in_flight: int | None = None
    tls: ssl.SSLContext | None = field(default=None, compare=False)
    tls_digest: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """A server we forward to: one or more replicas."""

    name: str
    replicas: tuple[ReplicaConfig, ...]


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """A backend and the model to ask it for; None keeps the caller's.

    `weight` is its share of the route's requests, beside the other targets' weights; None where the route has none.
    """

    backend: str
    model: str | None
    weight: int | None = None


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """When a target with a weight loses its traffic to the others.

    Attributes:
        max_error_rate: of the first attempts of requests, above 0 and up to 1; a target above it loses its traffic.
        window: seconds looked back on.
        min_requests: given to a target before it is judged.
    """

    max_error_rate: float = 0.05
    window: float = 60.0
    min_requests: int = 20


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """A model name, the beginning of names (`name-*`) or all of them (`*`), and the targets in order.

    `guard` is for targets with weights; None where nobody watches them.
    """

    model: str
    targets: tuple[TargetConfig, ...]
    guard: GuardConfig | None = None


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What a key may use; None: as much as there is."""

    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_in_flight: int | None = None


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """A gateway key.

    Attributes:
        name: as in metrics, spans and logs; None for one that has none.
        digest: SHA-256 of the key.
        models: those it may use, each by its name or the beginning of names (`name-*`); None for all.
        limits: what it may use.
    """

    name: str | None
    digest: bytes = field(repr=False)
    models: tuple[str, ...] | None = None
    limits: LimitsConfig = LimitsConfig()


@dataclass(frozen=True, slots=True)
class Routing:
    """All that is read anew while the gateway runs.

    Attributes:
        backends: all of them.
        routes: the first that matches a model wins.
        keys: the gateway keys, none: it is open.
        admin_key: of admin calls; None: there is none.
        limits_url: of the store by which instances share limits; None: there is none.
    """

    backends: tuple[BackendConfig, ...]
    routes: tuple[RouteConfig, ...]
    keys: tuple[KeyConfig, ...] = ()
    admin_key: str | None = field(default=None, repr=False)
    limits_url: str | None = field(default=None, repr=False)


def load_routing(settings: "Settings", files: Files | None = None) -> Routing:
    """Return the routing of these settings.

    Args:
        settings: of the environment.
        files: reads `GATEWAY_CONFIG` and what it names.

    Raises:
        SettingsError: the file is invalid; the message has line and key.
    """
    keys = _usual_keys(settings)
    admin_key, limits_url = map(_value, (settings.gateway_admin_key, settings.gateway_limits_url))
    if settings.gateway_config is not None:
        files = files or Files()
        root = _root_of(settings.gateway_config, files)
        routing = _File(settings.gateway_config, settings, files).routing(root)
        return replace(routing, keys=routing.keys or keys, admin_key=admin_key, limits_url=limits_url)
    api_key = _value(settings.gateway_backend_api_key)
    if api_key is not None and not _is_key(api_key):
        raise SettingsError("GATEWAY_BACKEND_API_KEY=(hidden) is not valid: it must be visible ASCII characters")
    replicas = tuple(
        replace(usual_replica(settings), name=f"backend-{n}", url=url, api_key=api_key)
        for n, url in enumerate(settings.gateway_backend_urls, 1)
    )
    return Routing(
        backends=(BackendConfig("backend", replicas),),
        routes=(RouteConfig("*", (TargetConfig("backend", None),)),),
        keys=keys,
        admin_key=admin_key,
        limits_url=limits_url,
    )


def examine(path: "Path", settings: "Settings") -> "Findings":
    """Return what a file says and all that is wrong with it, also where secrets that it names are not set."""
    findings = Findings(None, [], [])
    try:
        files = Files()
        routing = _File(path, settings, files, findings).routing(_root_of(path, files))
        findings.routing = replace(routing, keys=routing.keys or _usual_keys(settings))
    except SettingsError as wrong:
        findings.complaints.append(str(wrong))
    return findings


@dataclass(slots=True)
class Findings:
    """What is found in a file.

    Attributes:
        routing: what it says, as far as that is right; None when there is too little.
        complaints: what is wrong, with line and key.
        unset: the secrets that are not set here, with line and key.
    """

    routing: Routing | None
    complaints: list[str]
    unset: list[str]


def _usual_keys(settings: "Settings") -> tuple[KeyConfig, ...]:
    """Return the keys that hold where a file has none."""
    return tuple(KeyConfig(None, _digest(key.get_secret_value())) for key in settings.gateway_api_keys)


def usual_replica(settings: "Settings") -> ReplicaConfig:
    """Return a replica, without name and url, as the environment has it."""
    timeouts = Timeouts(*(getattr(settings, f"gateway_{timer}_timeout") for timer in _TIMERS))
    path = settings.gateway_probe_path
    probe = ProbeConfig(path, settings.gateway_probe_timeout, settings.gateway_probe_interval)
    return ReplicaConfig("", "", timeouts, probe if path else None)


def _root_of(path: "Path", files: Files) -> yaml.Node | None:
    """Return the root of a YAML file; None for an empty one. Raises: SettingsError."""
    shown = f"GATEWAY_CONFIG={str(path)!r}"
    try:
        data = files.read(path)
    except OSError as error:
        raise SettingsError(f"{shown}: {error.strerror}; it must be the path of a readable YAML file") from None
    try:
        text = data.decode("utf-8")
        loader = yaml.SafeLoader(text)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{shown}, line {data[: error.start].count(10) + 1}: not YAML in UTF-8") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SettingsError(f"{shown}, line {line}: not YAML in UTF-8: {error.reason}") from None
    try:
        root = loader.get_single_node()
        if root is not None:
            _check_aliases(root, {})
    except RecursionError:
        raise SettingsError(f"{shown}: it is nested too deep") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else loader.line + 1
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise SettingsError(f"{shown}, line {line}: {problem}") from None
    except (ValueError, OverflowError):  # an escaped character beyond Unicode, an endless version of YAML
        raise SettingsError(f"{shown}, line {loader.line + 1}: a character or a number is out of range") from None
    return root


def _check_aliases(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Return how many values a node stands for, with those that its aliases repeat.

    Args:
        node: it.
        sizes: of the nodes seen so far, by their `id`; None for those that are not done.

    Raises:
        MarkedYAMLError: a node holds itself, or more values than anybody writes.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise MarkedYAMLError(problem="it holds itself by an alias", problem_mark=node.start_mark)
        return size
    sizes[id(node)] = None
    size = 1
    if isinstance(node, yaml.CollectionNode):
        pairs = isinstance(node, yaml.MappingNode)
        for item in chain.from_iterable(node.value) if pairs else node.value:
            size += _check_aliases(item, sizes)
    if size > MAX_VALUES:
        raise MarkedYAMLError(
            problem=f"it stands for more than {MAX_VALUES} values by its aliases", problem_mark=node.start_mark
        )
    sizes[id(node)] = size
    return size


BACKEND_KEYS = {
    *("url", "urls", "api_key_env", "api_key_header", "headers", "query"),
    *("timeouts", "probe", "max_in_flight", "tls"),
}
LIMITS = tuple(each.name for each in fields(LimitsConfig))
T = TypeVar("T")
MAX_KEY_NAME = 64
"""Characters."""
MAX_LIMIT_DIGITS = 12
MAX_WINDOW = 86_400
"""Seconds that a guard looks back on at most."""


class _File:
    """Walks the nodes of the file: every complaint has its line and key.

    Without `findings` the first one is raised; with them all are gathered, of each entry the first beside unknown keys.
    """

    def __init__(self, path: "Path", settings: "Settings", files: Files, findings: Findings | None = None) -> None:
        self._path = path
        self._files = files
        self._findings = findings
        self._usual = usual_replica(settings)
        self._probe_path = settings.gateway_probe_path
        self._probe_timeout = settings.gateway_probe_timeout
        self._probe_interval = settings.gateway_probe_interval

    def routing(self, root: yaml.Node | None) -> Routing:
        if root is None:
            raise SettingsError(
                f"GATEWAY_CONFIG={str(self._path)!r}: the file is empty; it needs the keys backends and routes"
            )
        top = self._mapping(root, "the file", {"backends", "routes", "keys"}, required=("backends", "routes"))
        nodes = self._mapping(top["backends"], "backends", None)
        if not nodes:
            raise self._wrong(top["backends"], "backends", "needs at least one backend")
        backends = self._each(partial(self._backend, name, node) for name, node in nodes.items())
        self._each([partial(self._distinct_replicas, nodes, backends)])
        entries = self._list(top["routes"], "routes")
        routes = self._each(partial(self._route, node, f"routes[{n}]", set(nodes)) for n, node in enumerate(entries))
        keys = self._each([partial(self._keys, top["keys"])] if "keys" in top else [])
        return Routing(backends, routes, keys[0] if keys else ())

    def _each(self, entries: "Iterable[Callable[[], T]]") -> tuple[T, ...]:
        """Return what entries say; what is wrong with one is raised or gathered."""
        said = []
        for entry in entries:
            try:
                said.append(entry())
            except SettingsError as wrong:
                if self._findings is None:
                    raise
                self._findings.complaints.append(str(wrong))
        return tuple(said)

    def _backend(self, name: str, node: yaml.Node) -> BackendConfig:
        key = f"backends.{name}"
        if not _is_name(name):
            raise self._wrong(node, key, "a backend's name consists of letters, digits, '-', '_' and '.'")
        items = self._mapping(node, key, BACKEND_KEYS)
        if ("url" in items) == ("urls" in items):
            raise self._wrong(node, key, "needs exactly one of url and urls")
        api_key = self._api_key(items.get("api_key_env"), f"{key}.api_key_env")
        key_header = self._key_header(items, key)
        headers, secret_headers = self._headers(items.get("headers"), f"{key}.headers", key_header if api_key else "")
        tls, tls_digest = self._tls(items.get("tls"), f"{key}.tls")
        usual = replace(
            self._usual,
            timeouts=self._timeouts(items.get("timeouts"), f"{key}.timeouts"),
            probe=self._probe(items.get("probe"), f"{key}.probe"),
            api_key=api_key,
            api_key_header=key_header,
            headers=headers,
            secret_headers=secret_headers,
            query=self._query(items.get("query"), f"{key}.query"),
            max_in_flight=self._count(items.get("max_in_flight"), f"{key}.max_in_flight", at_least=1),
            tls=tls,
            tls_digest=tls_digest,
        )
        if "url" in items:
            nodes, names = {f"{key}.url": items["url"]}, [name]
        else:
            nodes = {f"{key}.urls[{n}]": url for n, url in enumerate(self._list(items["urls"], f"{key}.urls"))}
            names = [f"{name}-{n}" for n in range(1, len(nodes) + 1)]
        urls = [self._url(url, where) for where, url in nodes.items()]
        if usual.tls is not None and any(urlsplit(url).scheme != "https" for url in urls):
            raise self._wrong(items["tls"], f"{key}.tls", "needs https:// urls")
        return BackendConfig(
            name, tuple(replace(usual, name=name, url=url) for name, url in zip(names, urls, strict=True))
        )

    def _route(self, node: yaml.Node, key: str, known: set[str]) -> RouteConfig:
        items = self._mapping(node, key, {"model", "targets", "guard"}, required=("model", "targets"))
        nodes = self._list(items["targets"], f"{key}.targets")
        targets = tuple(self._target(item, f"{key}.targets[{n}]", known) for n, item in enumerate(nodes))
        weights = [target.weight for target in targets if target.weight is not None]
        if weights and len(weights) < len(targets):
            without = next(n for n, target in enumerate(targets) if target.weight is None)
            raise self._wrong(nodes[without], f"{key}.targets[{without}]", "needs a weight as the others have")
        if weights and not any(weights):
            raise self._wrong(items["targets"], f"{key}.targets", "needs at least one weight above 0")
        if "guard" in items and not weights:
            raise self._wrong(items["guard"], f"{key}.guard", "needs a weight on each of the route's targets")
        guard = self._guard(items["guard"], f"{key}.guard") if "guard" in items else None
        return RouteConfig(self._model(items["model"], f"{key}.model"), targets, guard)

    def _guard(self, node: yaml.Node, key: str) -> GuardConfig:
        items = self._mapping(node, key, {each.name for each in fields(GuardConfig)})
        usual = GuardConfig()
        rate, window = usual.max_error_rate, usual.window
        if "max_error_rate" in items:
            rate = self._number(items["max_error_rate"])
            if not 0 < rate <= 1:
                raise self._wrong(
                    items["max_error_rate"], f"{key}.max_error_rate", "needs a number greater than 0 and at most 1"
                )
        if "window" in items:
            window = self._seconds(items["window"], f"{key}.window")
            if window > MAX_WINDOW:
                raise self._wrong(items["window"], f"{key}.window", f"needs at most {MAX_WINDOW} seconds, a day")
        least = self._count(items.get("min_requests"), f"{key}.min_requests", at_least=1)
        return GuardConfig(rate, window, usual.min_requests if least is None else least)

    def _model(self, node: yaml.Node, key: str) -> str:
        """Return the name of a model, the beginning of names with a `*`, or `*`."""
        model = self._text(node, key)
        if "*" in model[:-1]:
            raise self._wrong(node, key, "a '*' can only be the last character")
        return model

    def _target(self, node: yaml.Node, key: str, known: set[str]) -> TargetConfig:
        items = self._mapping(node, key, {"backend", "model", "weight"}, required=("backend",))
        backend = self._text(items["backend"], f"{key}.backend")
        if backend not in known:
            raise self._wrong(
                items["backend"],
                f"{key}.backend",
                f"there is no backend {backend!r}; there are: {', '.join(sorted(known))}",
            )
        model = self._text(items["model"], f"{key}.model") if "model" in items else None
        return TargetConfig(backend, model, self._count(items.get("weight"), f"{key}.weight", at_least=0))

    def _distinct_replicas(self, nodes: dict[str, yaml.Node], backends: "Iterable[BackendConfig]") -> None:
        seen: set[str] = set()
        for backend in backends:
            for replica in backend.replicas:
                if replica.name in seen:
                    node, key = nodes[backend.name], f"backends.{backend.name}"
                    raise self._wrong(node, key, f"two replicas would be called {replica.name!r}")
                seen.add(replica.name)

    def _keys(self, node: yaml.Node) -> tuple[KeyConfig, ...]:
        """Return the gateway keys, each with a name and a value of its own."""
        keys: dict[str, KeyConfig] = {}

        def read(item: yaml.Node, where: str) -> None:
            key = self._gateway_key(item, where)
            for other, earlier in keys.items():
                if earlier.name == key.name:
                    raise self._wrong(item, f"{where}.name", f"{other} has the same name")
                if earlier.digest == key.digest:
                    raise self._wrong(item, where, f"it is the same key as {other}")
            keys[where] = key

        self._each(partial(read, item, f"keys[{n}]") for n, item in enumerate(self._list(node, "keys")))
        return tuple(keys.values())

    def _gateway_key(self, node: yaml.Node, key: str) -> KeyConfig:
        items = self._mapping(node, key, {"name", "key_env", "key_sha256", "models", "limits"}, required=("name",))
        name = self._text(items["name"], f"{key}.name")
        if not _is_name(name) or len(name) > MAX_KEY_NAME:
            raise self._wrong(
                items["name"],
                f"{key}.name",
                f"a key's name consists of up to {MAX_KEY_NAME} letters, digits, '-', '_' and '.'",
            )
        if ("key_env" in items) == ("key_sha256" in items):
            raise self._wrong(node, key, "needs exactly one of key_env and key_sha256")
        value = self._api_key(items.get("key_env"), f"{key}.key_env")
        digest = _digest(value) if value is not None else self._sha256(items["key_sha256"], f"{key}.key_sha256")
        models = None
        if "models" in items:
            nodes = self._list(items["models"], f"{key}.models")
            models = tuple(self._model(item, f"{key}.models[{n}]") for n, item in enumerate(nodes))
        return KeyConfig(name, digest, models, self._limits(items.get("limits"), f"{key}.limits"))

    def _sha256(self, node: yaml.Node, key: str) -> bytes:
        digits = node.value if isinstance(node, yaml.ScalarNode) else ""
        if not re.fullmatch("[0-9a-fA-F]{64}", digits):  # a number, to YAML, if none of them is a letter
            raise self._wrong(
                node, key, "needs the 64 hexadecimal digits of the key's SHA-256, without a line end in it"
            )
        return bytes.fromhex(digits)

    def _limits(self, node: yaml.Node | None, key: str) -> LimitsConfig:
        if node is None:
            return LimitsConfig()
        limits = {
            name: self._count(item, f"{key}.{name}", at_least=1, digits=MAX_LIMIT_DIGITS)
            for name, item in self._mapping(node, key, set(LIMITS)).items()
        }
        return LimitsConfig(**limits)

    def _api_key(self, node: yaml.Node | None, key: str) -> str | None:
        if node is None:
            return None
        name, value = self._secret(node, key)
        if not _is_key(value):
            raise self._wrong(node, key, f"the value of {name} must be visible ASCII characters")
        return value

    def _key_header(self, items: dict[str, yaml.Node], key: str) -> str:
        node = items.get("api_key_header")
        if node is None:
            return self._usual.api_key_header
        if "api_key_env" not in items:
            raise self._wrong(node, f"{key}.api_key_header", "needs api_key_env beside it")
        return self._header_name(node, self._text(node, f"{key}.api_key_header"), f"{key}.api_key_header")

    def _headers(
        self, node: yaml.Node | None, key: str, key_header: str
    ) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
        """Return the headers that anybody may see, and those that are secrets."""
        plain: dict[str, str] = {}
        secrets: dict[str, str] = {}
        for name, item in self._mapping(node, key, None).items() if node is not None else ():
            where = f"{key}.{name}"
            low = self._header_name(item, name, where)
            if low in plain or low in secrets:
                raise self._wrong(item, where, "the header occurs twice")
            if low == key_header:
                raise self._wrong(item, where, "the key of api_key_env is sent in this header")
            if isinstance(item, yaml.MappingNode):
                env = self._mapping(item, where, {"env"}, required=("env",))["env"]
                variable, value = self._secret(env, f"{where}.env")
                secrets[low], what = value, f"the value of {variable}"
            else:
                value, what = self._written(item, where), "it"
                (secrets if low in SECRET_NAMES else plain)[low] = value
            if not _fits_a_header(value):
                raise self._wrong(item, where, f"{what} must be ASCII characters without line ends and outer spaces")
        return tuple(plain.items()), tuple(secrets.items())

    def _header_name(self, node: yaml.Node, name: str, key: str) -> str:
        if not _TOKEN.fullmatch(name):
            raise self._wrong(node, key, f"{name!r} cannot be the name of a header")
        if name.lower() in GATEWAY_NAMES:
            raise self._wrong(node, key, "the gateway sets this header itself")
        return name.lower()

    def _query(self, node: yaml.Node | None, key: str) -> tuple[tuple[str, str], ...]:
        if node is None:
            return ()
        return tuple(
            (name, self._written(item, f"{key}.{name}")) for name, item in self._mapping(node, key, None).items()
        )

    def _timeouts(self, node: yaml.Node | None, key: str) -> Timeouts:
        if node is None:
            return self._usual.timeouts
        items = self._mapping(node, key, set(_TIMERS))
        return replace(
            self._usual.timeouts, **{name: self._seconds(item, f"{key}.{name}") for name, item in items.items()}
        )

    def _probe(self, node: yaml.Node | None, key: str) -> ProbeConfig | None:
        if node is None:
            return self._usual.probe
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}bool" and node.value.lower() in _NO:
            return None
        items = {"path": node}
        if isinstance(node, yaml.MappingNode):
            items = self._mapping(node, key, {"path", "timeout", "interval"})
        path, timeout, interval = self._probe_path, self._probe_timeout, self._probe_interval
        if "path" in items:
            where = f"{key}.path" if isinstance(node, yaml.MappingNode) else key
            path = self._text(items["path"], where)
            try:
                check_path(path)
            except ValueError:
                raise self._wrong(
                    items["path"], where, f"must be a path that begins with '/', or false; got {path!r}"
                ) from None
        if not path:
            raise self._wrong(node, key, "needs a path, since GATEWAY_PROBE_PATH is empty")
        if "timeout" in items:
            timeout = self._seconds(items["timeout"], f"{key}.timeout")
        if "interval" in items:
            interval = self._seconds(items["interval"], f"{key}.interval")
        return ProbeConfig(path, timeout, interval)

    def _tls(self, node: yaml.Node | None, key: str) -> tuple[ssl.SSLContext | None, bytes | None]:
        """Return what is made of the files, and a digest of them."""
        if node is None:
            return None, None
        items = self._mapping(node, key, {"ca", "cert", "key"})
        if "key" in items and "cert" not in items:
            raise self._wrong(node, key, "needs cert beside key")
        digest = sha256()
        files: dict[str, str] = {}
        for name, item in items.items():
            files[name], content = self._file(item, f"{key}.{name}")
            digest.update(name.encode() + sha256(content).digest())
        try:
            context = ssl.create_default_context(cafile=files.get("ca"))
        except ssl.SSLError:
            raise self._wrong(items["ca"], f"{key}.ca", "the file holds no certificate in PEM form") from None
        context.set_alpn_protocols(("http/1.1",))
        if "cert" in files:
            try:
                # A key behind a password must fail, not ask on the terminal for it.
                context.load_cert_chain(files["cert"], files.get("key"), password="")
            except ssl.SSLError as error:
                fits = "the key is for another certificate" if error.reason == "KEY_VALUES_MISMATCH" else ""
                raise self._wrong(
                    items["cert"],
                    f"{key}.cert",
                    fits or "needs a certificate and its key, without a password, in PEM form",
                ) from None
        return context, digest.digest()

    def _file(self, node: yaml.Node, key: str) -> tuple[str, bytes]:
        """Return the path of a file, and its content; a relative one is meant from the configuration's folder."""
        path = self._path.parent / self._text(node, key)
        try:
            content = self._files.read(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no path"
            raise self._wrong(node, key, f"{str(path)!r}: {reason}; it must be the path of a readable file") from None
        return str(path), content

    def _secret(self, node: yaml.Node, key: str) -> tuple[str, str]:
        """Return the name of a variable, and its value."""
        name = self._text(node, key)
        try:
            value = secret(name, self._files)
        except SettingsError as wrong:
            raise self._wrong(node, key, str(wrong)) from None
        if value is None:
            unset = self._wrong(node, key, f"neither {name} nor {name}_FILE is set in the environment")
            if self._findings is None:
                raise unset
            self._findings.unset.append(str(unset))
            return name, f"unset-{name}"
        return name, value

    def _url(self, node: yaml.Node, key: str) -> str:
        url = self._text(node, key)
        try:
            return check_url(url)
        except ValueError as error:
            raise self._wrong(node, key, str(error)) from None

    def _seconds(self, node: yaml.Node, key: str) -> float:
        value = self._number(node)
        if not 0 < value < float("inf"):
            raise self._wrong(node, key, "needs a number of seconds greater than 0")
        return value

    def _number(self, node: yaml.Node) -> float:
        """Return a number; 0 where there is none."""
        try:
            return float(node.value) if node.tag in {f"{_TAG}int", f"{_TAG}float"} else 0.0
        except ValueError:
            return 0.0

    def _count(self, node: yaml.Node | None, key: str, *, at_least: int, digits: int = 9) -> int | None:
        if node is None:
            return None
        written = node.value if node.tag == f"{_TAG}int" else ""
        if not re.fullmatch(f"[0-9]{{1,{digits}}}", written) or int(written) < at_least:
            raise self._wrong(node, key, f"needs a whole number of at least {at_least} and at most {digits} digits")
        return int(written)

    def _written(self, node: yaml.Node, key: str) -> str:
        """Return a value as it is written: `2024-10-21` is a date to YAML, and plainly meant as text."""
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _WRITTEN:
            raise self._wrong(node, key, "needs a text")
        return self._printable(node, key)

    def _text(self, node: yaml.Node, key: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != f"{_TAG}str" or not node.value:
            raise self._wrong(node, key, "needs a text that is not empty")
        return self._printable(node, key)

    def _printable(self, node: yaml.ScalarNode, key: str) -> str:
        value = str(node.value)
        if not value.isprintable():
            raise self._wrong(node, key, "must not hold line ends, control characters or half a surrogate pair")
        return value

    def _list(self, node: yaml.Node, key: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or node.tag != f"{_TAG}seq" or not node.value:
            raise self._wrong(node, key, "needs a list with at least one entry")
        return list(node.value)

    def _mapping(
        self, node: yaml.Node, key: str, allowed: set[str] | None, required: tuple[str, ...] = ()
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode) or node.tag != f"{_TAG}map":
            raise self._wrong(node, key, "needs a mapping")
        items: dict[str, yaml.Node] = {}
        for name_node, value in node.value:
            if not isinstance(name_node, yaml.ScalarNode) or name_node.tag != f"{_TAG}str":
                raise self._wrong(
                    name_node, key, "needs texts as keys; put numbers, dates and words like yes in quotes"
                )
            name = self._printable(name_node, key)
            if name in items:
                raise self._wrong(name_node, f"{key}: {name}", "the key occurs twice")
            if allowed is None or name in allowed:
                items[name] = value
                continue
            unknown = self._wrong(name_node, f"{key}: {name}", f"unknown key; allowed: {', '.join(sorted(allowed))}")
            if self._findings is None:
                raise unknown
            self._findings.complaints.append(str(unknown))
        for name in required:
            if name not in items:
                raise self._wrong(node, key, f"the key {name!r} is missing")
        return items

    def _wrong(self, node: yaml.Node, key: str, message: str) -> SettingsError:
        return SettingsError(f"GATEWAY_CONFIG={str(self._path)!r}, line {node.start_mark.line + 1}, {key}: {message}")


def _value(secret: "SecretStr | None") -> str | None:
    return secret.get_secret_value() if secret is not None else None


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _is_name(text: str) -> bool:
    return bool(text) and text.isascii() and all(c.isalnum() or c in "-_." for c in text)


def _is_key(value: str) -> bool:
    return value.isascii() and value.isprintable() and " " not in value


def _fits_a_header(value: str) -> bool:
    return value.isascii() and value.isprintable() and value == value.strip()
