"""How a replica is asked, as one generation of the configuration says."""

from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_plus, urlencode, urlsplit

if TYPE_CHECKING:
    from gateway.config import ReplicaConfig


class Endpoint:
    """One url of a backend: where calls go, with what, and how long they may take. It never changes.

    Attributes:
        config: what was configured for it.
        name: as in `x-gateway-backend`.
        timeouts: of its attempts.
        base: what the SDKs call `base_url`: the url, with `/v1` if it has no path of its own.
        origin: scheme, host and port; the path of the probe is appended to it.
        shown_url: the configured url without user info.
        user_info: user and password from the url, or None.
    """

    def __init__(self, config: "ReplicaConfig") -> None:
        parts = urlsplit(config.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
        path = parts.path.rstrip("/")
        self.config = config
        self.name = config.name
        self.timeouts = config.timeouts
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.origin = f"{parts.scheme}://{host}{port}"
        self._base_path = path or "/v1"
        self.base = self.origin + self._base_path
        self._query = urlencode(config.query, quote_via=quote)
        self._query_names = frozenset(name for name, _ in config.query)
        self.shown_url = self.origin + parts.path
        self.user_info = parts.netloc.rpartition("@")[0] or None
        self._urls: dict[str, str] = {}

    def url_of(self, path: str) -> str:
        """Return the url of a call, without the query; `path` has the template in place of an id.

        A path below `/v1` follows the base without it. Any other, such as `/tokenize`, stands beside the `/v1` that
        ends most bases, as vLLM and llama.cpp have it.
        """
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = _joined(self.base, path)
        return url

    def target_of(self, path: str, query: str) -> str:
        """Return what a call asks for (RFC 9112, 3.2): path and query; the endpoint's own query wins over the caller's.

        Args:
            path: of the call, its id too; otherwise as in `url_of`.
            query: of the caller, encoded; empty for none.
        """
        target = _joined(self._base_path, path)
        if query or self._query:
            kept = [pair for pair in query.split("&") if pair and not self._is_own(pair)]
            target = f"{target}?{'&'.join([*kept, self._query] if self._query else kept)}"
        return target

    def _is_own(self, pair: str) -> bool:
        """Return whether a pair of a query has a name that is configured for the endpoint."""
        return unquote_plus(pair.partition("=")[0]) in self._query_names


def _joined(base: str, path: str) -> str:
    return base + path[3:] if path.startswith("/v1/") else base.removesuffix("/v1") + path
