"""Limits that several instances share: they hold together, and a store in trouble is in nobody's way."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random, randrange
from typing import Any

import pytest
import trustme
from msgspec import msgpack
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from gateway.limits_store import LimitsStore
from gateway.policy.ledger import Answer as LedgerAnswer
from gateway.policy.ledger import Asked, Ledger, Report
from gateway.valkey import Valkey
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.http import Answer
from testkit.limits_server import LimitsServer
from testkit.polling import PATIENCE, until
from testkit.ports import free_port
from tests.integration.gateways import Gateway, StartGateway, config, get, patient

KEY = "gw-secret-of-a"
HANG = {"kind": "hang_before_headers"}
SKEW, EVEN = (85, 5, 5, 5), (25, 25, 25, 25)
"""Percent of the requests that each instance gets."""
TOKENS = len(json.dumps(CHAT | {"max_tokens": 80})) // 4 + 80
"""That a chat with at most 80 tokens reserves."""
DOCS = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")

Start = Callable[..., Any]


@pytest.fixture
def store(limits_server: LimitsServer, monkeypatch: pytest.MonkeyPatch) -> LimitsServer:
    """A running store that is never given up for its slowness, which may be this machine's."""
    monkeypatch.setattr("gateway.valkey.TIMEOUT", PATIENCE)
    monkeypatch.setattr("gateway.limits_store.LAST", PATIENCE)
    return limits_server


@pytest.fixture
def start(start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start instances that share the limits of one key: `start(mock, store, count, "requests_per_day: 100")`."""

    async def start_sharing(
        mock: MockModel,
        store: LimitsServer | str | None,
        count: int,
        limits: str,
        **settings: Any,  # noqa: ANN401
    ) -> list[Gateway]:
        monkeypatch.setenv("TEAM_A_KEY", KEY)
        text = f"""
backends: {{backend: {{url: "{mock.url}"}}}}
routes: [{{model: "*", targets: [{{backend: backend}}]}}]
keys:
  - {{name: team-a, key_env: TEAM_A_KEY, limits: {{{limits}}}}}
"""
        if store is not None:  # else the environment has it
            settings["gateway_limits_url"] = store if isinstance(store, str) else store.url
        file = config(tmp_path, text)
        return [await patient(start_gateway)(gateway_config=file, **settings) for _ in range(count)]

    return start_sharing


async def ask(gateway: Gateway, **changes: Any) -> Answer:  # noqa: ANN401
    return await gateway.chat(headers={"authorization": f"Bearer {KEY}"}, **changes)


async def ask_skewed(
    gateways: list[Gateway],
    number: int,
    seed: int,
    *,
    shares: tuple[int, ...] = SKEW,
    at_once: int = 10,
    **changes: Any,  # noqa: ANN401
) -> list[int]:
    """Ask instances by `SKEW`; the statuses of the answers."""
    random = Random(seed)
    statuses: list[int] = []
    while len(statuses) < number:
        chosen = random.choices(gateways, shares[: len(gateways)], k=at_once)
        statuses += [answer.status for answer in await asyncio.gather(*(ask(each, **changes) for each in chosen))]
    return statuses


async def is_said(gateway: Gateway, status: str) -> None:
    """Wait until `/health` and the metrics say so."""

    async def said() -> bool:
        health = await gateway.health()
        families = text_string_to_metric_families(await gateway.metrics())
        (degraded,) = [family.samples[0].value == 1 for family in families if family.name == "gateway_limits_degraded"]
        expected = status == "degraded"
        return (health["limits"]["status"], health["status"] == "degraded", degraded) == (status, expected, expected)

    await until(said, f"limits: {status}", seconds=20)


@pytest.mark.parametrize("seed", [1, randrange(1 << 32)], ids=["1", "another"])
async def test_the_script_in_the_store_is_the_ledger(store: LimitsServer, seed: int) -> None:
    """Random reports of three processes, some of which come late or again: both give the same answers."""
    random, now, valkey = Random(seed), [0.0], Valkey(store.url)
    ledger = Ledger(lambda: now[0])
    epochs, reports = dict.fromkeys("abc", ""), []
    for number in range(1, 400):
        process = random.choice("abc")
        slot = int(now[0])
        asked = [
            Asked(name, 500, seconds, 0, random.randint(0, 9), random.randint(0, 99), random.randint(0, 30), changes)
            for name, seconds in (("requests_per_minute", 60), ("tokens_per_day", 86_400))
            for changes in (
                [(slot // (seconds // 60) - random.randint(-2, 70), random.randint(-5, 20)) for _ in range(3)],
            )
        ]
        asked.append(Asked("max_in_flight", 20, 0, random.randint(0, 5), random.randint(0, 3), 4, 2, []))
        report = Report(process, number, number - random.randint(0, 2), epochs[process], "e", number < 3, asked)
        reports.append(report)
        if random.random() < 0.1:
            report = random.choice(reports)
        answer = msgpack.decode((await valkey.exchange([("ledger", msgpack.encode(report))]))[0], type=LedgerAnswer)
        now[0] = answer.time
        assert ledger.exchange(report) == answer, f"seed {seed}, report {number}"
        epochs[process] = answer.epoch
    await valkey.close()


@pytest.mark.parametrize("seed", [1, randrange(1 << 32)], ids=["1", "another"])
@pytest.mark.parametrize("shares", [SKEW, EVEN], ids=["skewed", "even"])
async def test_all_instances_together_let_through_what_the_limit_allows(
    mock: MockModel, store: LimitsServer, start: Start, seed: int, shares: tuple[int, ...]
) -> None:
    gateways = await start(mock, store, 4, "requests_per_day: 200", gateway_queue_timeout=10)
    statuses = await ask_skewed(gateways, 400, seed, shares=shares)
    assert set(statuses) == {200, 429}
    assert mock.journal.total == statuses.count(200)
    assert 180 <= mock.journal.total <= 200, f"seed {seed}"


async def test_tokens_are_shared_to_the_token(mock: MockModel, store: LimitsServer, start: Start) -> None:
    gateways = await start(mock, store, 4, f"tokens_per_day: {20 * TOKENS}", gateway_queue_timeout=10)
    mock.set_faults([HANG])
    tasks = [asyncio.create_task(ask(gateways[n % 4 if n % 3 else 0], max_tokens=80)) for n in range(60)]
    await until(lambda: sum(task.done() for task in tasks) >= 40, seconds=30)
    await mock.called(20)
    assert {task.result().status for task in tasks if task.done()} == {429}
    assert mock.journal.total == 20
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_largest_request_passes_while_nothing_is_used(
    mock: MockModel, store: LimitsServer, start: Start
) -> None:
    gateways = await start(mock, store, 2, "tokens_per_day: 1000", gateway_queue_timeout=10)
    for gateway in gateways:
        assert (await ask(gateway, max_tokens=1)).status == 200
    await until(lambda: all(held(gateway) for gateway in gateways))
    left = 1000 - sum(used(gateway, "tokens_per_day") for gateway in gateways)
    mock.set_faults([HANG])
    largest = asyncio.create_task(ask(gateways[1], max_tokens=left - (TOKENS - 80) - 1))
    await mock.called(3)
    mock.set_faults([])
    assert (await ask(gateways[0], max_tokens=10)).status == 429
    largest.cancel()
    await asyncio.gather(largest, return_exceptions=True)


def used(gateway: Gateway, limit: str) -> int:
    """What one instance has used, as it has it."""
    (limits,) = (each.limits for each in gateway.parts.keys.callers if each.limits is not None)
    return next(now for known, _, now in limits.state() if known == limit)


async def test_no_more_are_in_flight_at_all_instances_than_the_key_may_have(
    mock: MockModel, store: LimitsServer, start: Start
) -> None:
    gateways = await start(mock, store, 4, "max_in_flight: 6", gateway_queue_timeout=30)
    mock.set_faults([{"kind": "latency", "with": {"delay": 0.05}}])
    tasks = [asyncio.create_task(ask(gateways[n % 4])) for n in range(60)]
    highest = 0
    while not all(task.done() for task in tasks):
        highest = max(highest, mock.in_flight)
        await asyncio.sleep(0.005)
    assert {task.result().status for task in tasks} == {200}
    assert 4 <= highest <= 6


async def test_what_the_share_admits_waits_for_no_store_and_is_told_what_is_left_of_the_whole(
    mock: MockModel, store: LimitsServer, start: Start
) -> None:
    gateways = await start(mock, store, 2, "requests_per_day: 1000", gateway_queue_timeout=10)
    for gateway in gateways:
        for _ in range(5):
            assert (await ask(gateway)).status == 200
    await until(lambda: held(gateways[0]) >= 10 and held(gateways[1]) >= 10)
    client = Redis(port=store.port)

    def exchanges() -> list[int]:
        return [gateway.parts.limits.exchanges for gateway in gateways]

    counted = sum(exchanges())
    before = (await client.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"]
    answers = [await ask(gateways[0]) for _ in range(10)]
    assert {answer.status for answer in answers} == {200}
    assert all(answer.timing[0][0] == "queue" and not answer.timing[0][2] for answer in answers), "nobody was queued"
    remaining = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]
    assert remaining == sorted(remaining, reverse=True)
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"1000"}

    async def left() -> str:
        return (await get(gateways[0], "/v1/models", authorization=f"Bearer {KEY}")).headers[
            "x-ratelimit-remaining-requests"
        ]

    async def all_is_known() -> bool:
        return await left() == "980"

    await until(all_is_known, "what both have used is known")
    after, known = (await client.info("commandstats"))["cmdstat_evalsha"]["calls"], exchanges()
    await until(lambda: all(now > one for now, one in zip(exchanges(), known, strict=True)), "all are counted")
    assert after - before <= sum(known) + len(gateways) - counted, "but for those whose answers were on their way"
    await client.aclose()


def held(gateway: Gateway) -> int:
    """How many requests an instance may take without asking; a look inside."""
    (limits,) = (each.limits for each in gateway.parts.keys.callers if each.limits is not None)
    return min(window.most - window.used for window in limits.windows)


def share(gateway: Gateway) -> int:
    """What an instance goes on with; a look inside."""
    assert isinstance(gateway.parts.limits, LimitsStore)
    (allotment,) = gateway.parts.limits._keys
    return allotment._parts[0].share or 0


@asynccontextmanager
async def slow_before(store: LimitsServer, seconds: float) -> AsyncIterator[str]:
    """Pass on each piece of an answer so much later; the url."""
    pipes: set[asyncio.Task[None]] = set()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pause: float) -> None:
        try:
            while data := await reader.read(65_536):
                await asyncio.sleep(pause)
                writer.write(data)
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", store.port)
        pipes.update({asyncio.create_task(pipe(reader, back, 0)), asyncio.create_task(pipe(there, writer, seconds))})

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"valkey://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in pipes:
            task.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)


async def test_a_slow_store_is_in_nobodys_way(mock: MockModel, store: LimitsServer, start: Start) -> None:
    async with slow_before(store, 0.1) as url:
        (gateway,) = await start(mock, url, 1, "requests_per_day: 1000", gateway_queue_timeout=10)
        await is_said(gateway, "ok")
        assert (await ask(gateway)).status == 200
        await until(lambda: held(gateway) >= 40)
        answers = [await ask(gateway) for _ in range(30)]
        assert {answer.status for answer in answers} == {200}
        assert not any(answer.timing[0][2] for answer in answers), "nobody was queued"
        await is_said(gateway, "ok")
        await gateway.client.close()


@pytest.mark.parametrize("trouble", ["killed", "frozen"])
async def test_without_the_store_each_goes_on_with_its_share_and_all_comes_back(
    mock: MockModel, limits_server: LimitsServer, start: Start, trouble: str
) -> None:
    store = limits_server
    gateways = await start(mock, store, 2, "requests_per_day: 100", gateway_queue_timeout=20)
    await is_said(gateways[0], "ok")
    for gateway in gateways:
        for _ in range(10):
            assert (await ask(gateway)).status == 200
    await until(lambda: 95 <= sum(share(gateway) for gateway in gateways) <= 100, "each has heard of the other")
    if trouble == "killed":
        await store.kill()
    else:
        store.freeze()
    for gateway in gateways:
        await is_said(gateway, "degraded")
        assert gateway.log.getvalue().count("\n") == 10
    statuses = [(await ask(gateway)).status for _ in range(70) for gateway in gateways]
    assert 90 <= mock.journal.total <= 105
    assert statuses.count(200) >= 50
    refused = await ask(gateways[0])
    assert (refused.status, refused.own_error["code"]) == (429, "rate_limit_exceeded")
    assert "Other instances cannot be asked now." in refused.own_error["message"]
    if trouble == "killed":
        await store.start()
    else:
        store.thaw()
    for gateway in gateways:
        await is_said(gateway, "ok")
    total = mock.journal.total
    await ask_skewed(gateways, 50, 2)
    assert mock.journal.total <= max(total, 105), "what was used without the store is reported"


async def test_a_store_that_was_emptied_is_told_what_was_used(
    mock: MockModel, store: LimitsServer, start: Start
) -> None:
    gateways = await start(mock, store, 4, "requests_per_day: 100", gateway_queue_timeout=20)
    await ask_skewed(gateways, 80, 1)
    total = mock.journal.total
    assert total == 80
    client = Redis(port=store.port)
    await client.flushall()
    await ask_skewed(gateways, 120, 2)

    async def the_rest_is_leased_again() -> bool:
        await asyncio.gather(*(ask(gateway) for gateway in gateways))
        return mock.journal.total >= 95

    await until(the_rest_is_leased_again, seconds=20)
    await asyncio.gather(*(ask(gateway) for gateway in gateways * 5))
    assert mock.journal.total <= 105
    await client.aclose()


@pytest.mark.parametrize("report_epoch", ["", "before"])
@pytest.mark.parametrize(
    "value",
    [b"no ledger", b"", b"\xc1", b"\x01", b"\x80", b"\x90", b"\xc0", msgpack.encode({"epoch": "before"}), None],
    ids=["text", "empty", "invalid", "number", "map", "array", "nil", "half", "list"],
)
async def test_what_is_no_ledger_gives_way_to_one_and_is_in_no_other_keys_way(
    store: LimitsServer, value: bytes | None, report_epoch: str
) -> None:
    async with Redis(port=store.port) as redis:
        await (redis.set("a", value) if value is not None else redis.lpush("a", "no ledger"))
    valkey = Valkey(store.url)
    answers = []
    for number, epoch in ((1, report_epoch), (2, "new")):
        asked = [Asked("requests_per_day", 40, 86_400, 0, 0, 5, 5, [])]
        report = msgpack.encode(Report("p", number, number, epoch, "new", bool(epoch), asked))
        answers = await valkey.exchange([("a", report), ("b", report)])
    for answer in answers:
        assert msgpack.decode(answer, type=LedgerAnswer).epoch == "new"
    await valkey.close()


async def test_a_store_full_of_wrong_values_shares_the_limits_all_the_same(
    mock: MockModel, store: LimitsServer, start: Start
) -> None:
    gateways = await start(mock, store, 2, "requests_per_day: 40", gateway_queue_timeout=10)
    assert [(await ask(gateway)).status for gateway in gateways] == [200, 200]
    async with Redis(port=store.port) as redis:
        (key,) = await redis.keys()
        await redis.delete(key)
        await redis.hset(key, "no", "ledger")
        assert set(await ask_skewed(gateways, 80, 1)) == {200, 429}
        await until(lambda: _is_a_text(redis, key))
    await ask_skewed(gateways, 40, 1)
    assert mock.journal.total <= 40
    for gateway in gateways:
        await is_said(gateway, "ok")


async def _is_a_text(redis: Redis, key: bytes | str) -> bool:
    return await redis.type(key) == b"string"


async def test_an_instance_that_never_reached_the_store_uses_a_part_of_each_limit_until_it_does(
    mock: MockModel, store: LimitsServer, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    await store.kill()
    gateways = await start(
        mock, store, 2, "requests_per_day: 40", gateway_queue_timeout=20, gateway_limits_fallback_share=0.2
    )
    for gateway in gateways:
        await is_said(gateway, "degraded")
        statuses = [(await ask(gateway)).status for _ in range(12)]
        assert statuses == [200] * 8 + [429] * 4
    assert sum("limits cannot be shared" in record.message for record in caplog.records) == 2, "each says it once"
    await store.start()
    for gateway in gateways:
        await is_said(gateway, "ok")

    async def the_rest_is_leased() -> bool:  # not before the store has heard of all who went on without it
        await ask_skewed(gateways, 40, 1)
        return mock.journal.total >= 36

    await until(the_rest_is_leased, seconds=20)
    assert mock.journal.total <= 42


async def test_the_password_of_the_store_shows_nowhere_and_keys_are_there_by_name_only(
    mock: MockModel, tmp_path: Path, store: LimitsServer, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    client = Redis(port=store.port)
    await client.config_set("requirepass", "s3cret/of:the@store")
    await client.aclose()
    url = f"redis://default:s3cret%2Fof%3Athe%40store@127.0.0.1:{store.port}/3"
    (gateway,) = await start(mock, url, 1, "requests_per_day: 40")
    await is_said(gateway, "ok")
    assert (await ask(gateway)).status == 200
    client = Redis(port=store.port, password="s3cret/of:the@store", db=3)
    await until(lambda: gateway.parts.limits.exchanges > 1)
    assert await client.keys() == [b"llm-gateway:limits:team-a"]
    assert 0 < await client.ttl("llm-gateway:limits:team-a") < 100_000
    assert KEY.encode() not in (await client.get("llm-gateway:limits:team-a") or b"")
    await client.config_set("requirepass", "another")
    await client.client_kill_filter(_type="normal", skipme=True)
    await is_said(gateway, "degraded")
    await client.aclose()
    everything = [gateway.log.getvalue(), await gateway.metrics(), json.dumps(await gateway.health()), caplog.text]
    everything += [span.to_json() for span in gateway.spans()]
    assert not any("s3cret" in text for text in everything)
    assert f"127.0.0.1:{store.port}" in caplog.text


async def test_a_store_may_be_behind_tls(
    mock: MockModel, tmp_path: Path, limits_server: LimitsServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, files = trustme.CA(), {name: str(tmp_path / f"{name}.pem") for name in ("ca", "cert", "key")}
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(files["ca"])
    certificate.cert_chain_pems[0].write_to_path(files["cert"])
    certificate.private_key_pem.write_to_path(files["key"])
    options = ["--tls-port", "PORT", "--tls-cert-file", files["cert"], "--tls-key-file", files["key"]]
    options += ["--tls-ca-cert-file", files["ca"], "--tls-auth-clients", "no"]
    async with LimitsServer(tmp_path, *options) as store:
        url = f"valkeys://127.0.0.1:{store.port}"
        (strangers,) = await start(mock, url, 1, "requests_per_day: 40")
        await is_said(strangers, "degraded")
        monkeypatch.setenv("SSL_CERT_FILE", files["ca"])
        (gateway,) = await start(mock, url, 1, "requests_per_day: 40")
        await is_said(gateway, "ok")
        assert (await ask(gateway)).status == 200


@pytest.fixture
async def cluster(tmp_path: Path, store: LimitsServer) -> AsyncIterator[LimitsServer]:
    """A cluster of one node; `store`: only where there is a server."""
    del store
    async with LimitsServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", f"{free_port()}") as node:
        client = Redis(port=node.port)
        await client.execute_command(  # type: ignore[no-untyped-call]
            "CLUSTER", "ADDSLOTSRANGE", 0, 16383
        )

        async def is_up() -> bool:
            return bool((await client.cluster("INFO"))["cluster_state"] == "ok")

        await until(is_up, "the cluster", seconds=20)
        await client.aclose()
        yield node


async def test_a_cluster_is_a_store_too(mock: MockModel, cluster: LimitsServer, start: Start) -> None:
    gateways = await start(mock, cluster, 2, "requests_per_day: 40", gateway_queue_timeout=10)
    for gateway in gateways:
        await is_said(gateway, "ok")
    await ask_skewed(gateways, 60, 1)
    assert 36 <= mock.journal.total <= 40


@pytest.mark.parametrize("in_cluster", [False, True], ids=["alone", "cluster"])
async def test_a_user_needs_no_more_than_the_docs_say(
    mock: MockModel, store: LimitsServer, cluster: LimitsServer, start: Start, *, in_cluster: bool
) -> None:
    found = re.search(r"A user needs `([^`]*)`, of a cluster also `([^`]*)`", DOCS)
    assert found is not None
    rules, server = (f"{found[1]} {found[2]}", cluster) if in_cluster else (found[1], store)
    client = Redis(port=server.port)
    await client.execute_command(  # type: ignore[no-untyped-call]
        "ACL", "SETUSER", "gateway", "on", ">secret", *rules.split()
    )
    (gateway,) = await start(mock, f"valkey://gateway:secret@127.0.0.1:{server.port}", 1, "requests_per_day: 40")
    await is_said(gateway, "ok")
    assert (
        await gateway.chat(path="/v1/responses", input="hi", headers={"authorization": f"Bearer {KEY}"})
    ).status == 200

    async def has_hint_and_ledger() -> bool:
        keys = await client.keys("llm-gateway:*")
        return sorted(key.split(b":")[1] for key in keys if isinstance(key, bytes)) == [b"limits", b"responses"]

    await until(has_hint_and_ledger)
    await client.aclose()


async def test_a_key_may_lose_its_limits_and_have_them_again(
    mock: MockModel, store: LimitsServer, start: Start, tmp_path: Path
) -> None:
    (gateway,) = await start(mock, store, 1, "requests_per_day: 40", gateway_queue_timeout=20)
    for _ in range(10):
        assert (await ask(gateway)).status == 200
    limited = (tmp_path / "gateway.yaml").read_text()

    async def follows(text: str) -> None:
        generations = gateway.parts.generations
        number = generations.current.number
        config(tmp_path, text)
        await until(lambda: generations.current.number > number, lambda: str(generations.error))

    limits = gateway.parts.limits
    assert isinstance(limits, LimitsStore)
    reported = limits.exchanges + 2
    await until(lambda: limits.exchanges >= reported)
    await follows(limited.replace("limits: {requests_per_day: 40}", ""))
    for _ in range(3):
        assert "x-ratelimit-limit-requests" not in (await ask(gateway)).headers
    await follows(limited)

    async def remembered() -> bool:
        answer = await ask(gateway)
        return int(answer.headers["x-ratelimit-remaining-requests"]) < 30

    await until(remembered, "what was used before counts")
    await ask_skewed([gateway], 60, 1)
    assert mock.journal.total == 40 + 3


async def test_the_file_with_the_store_s_password_is_read_anew(
    mock: MockModel, store: LimitsServer, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def url(password: str) -> str:
        return f"valkey://:{password}@127.0.0.1:{store.port}"

    client = Redis(port=store.port)
    await client.config_set("requirepass", "old")
    secret = tmp_path / "store"
    secret.write_text(url("old"))
    monkeypatch.setenv("GATEWAY_LIMITS_URL_FILE", str(secret))
    (gateway,) = await start(mock, None, 1, "requests_per_day: 40")
    await is_said(gateway, "ok")
    await client.aclose()
    client = Redis(port=store.port, password="old")
    await client.config_set("requirepass", "new")
    secret.write_text(url("new"))
    await until(lambda: gateway.parts.generations.current.number == 2)
    await client.client_kill_filter(_type="normal", skipme=True)
    await is_said(gateway, "ok")
    assert isinstance(gateway.parts.limits, LimitsStore)
    failures = gateway.parts.limits.failures
    assert (await ask(gateway)).status == 200
    reported = gateway.parts.limits.exchanges + 2
    await until(lambda: gateway.parts.limits.exchanges >= reported)
    assert gateway.parts.limits.failures == failures
    await client.aclose()


async def test_what_an_instance_holds_is_given_back_when_it_stops(
    mock: MockModel, store: LimitsServer, start: Start
) -> None:
    gateways = await start(mock, store, 2, "requests_per_day: 40", gateway_queue_timeout=20)
    for _ in range(10):
        assert (await ask(gateways[0])).status == 200
    await until(lambda: held(gateways[0]) > 0)
    await gateways[0].client.close()
    statuses = [(await ask(gateways[1])).status for _ in range(40)]
    assert statuses.count(200) == 30


async def test_the_keys_of_an_answer_about_models_ask_nothing(
    mock: MockModel, store: LimitsServer, start: Start
) -> None:
    (gateway,) = await start(mock, store, 1, "requests_per_day: 40")
    answer = await get(gateway, "/v1/models", authorization=f"Bearer {KEY}")
    assert answer.headers["x-ratelimit-remaining-requests"] == "40"
