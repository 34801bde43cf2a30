"""The live page in a real browser, before a real gateway and a mock model that is broken from the page.

Promises: what is broken is seen there, and that it is well again; no name that a caller chose becomes HTML; the
keyboard is enough; nothing scrolls sideways on a phone 360 px wide; the page asks nobody but its gateway.

They need Chromium or Chrome; BROWSER_TESTS=require makes its absence a failure.
"""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from testkit.browser import DESK, Tab
from testkit.completions import CHAT, CHAT_PATH
from testkit.http import ask
from testkit.servers import Gateway, MockModel

ADMIN = "admin-key-of-the-tests"
KEY = "gw-key-1"
PHONE = (360, 780)
EVIL = "<img/src=x/onerror=document.title='pwned'>"
EVIL_IDS = (EVIL, '"><script>document.title="pwned"</script>', "..", ".", "a/b?c#d%2e%00", "javascript:alert(1)")
VIEWS = ("now", "requests", "callers", "try")

StartGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[AsyncExitStack]:
    """What runs until the end of a test."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def mock(running: AsyncExitStack, tmp_path: Path) -> MockModel:
    delays = {"MOCK_TTFT": "0.01", "MOCK_TOKEN_INTERVAL": "0.005"}
    return await running.enter_async_context(MockModel("mock", tmp_path, delays))


@pytest.fixture
async def start_gateway(running: AsyncExitStack, mock: MockModel, tmp_path: Path) -> StartGateway:
    async def start(**settings: str) -> Gateway:
        own = {
            "GATEWAY_BACKEND_URLS": mock.url,
            "GATEWAY_UI_MOCK_CONTROL": mock.control_url,
            "GATEWAY_OUTAGE_WAIT": "0",
        }
        return await running.enter_async_context(Gateway("gateway", tmp_path, own | settings))

    return start


def button(action: str, view: str = "now") -> str:
    """Where a button that breaks the mock model is."""
    return f"#mock-{view} [data-action={action}]"


def breaker(view: str = "backends") -> str:
    """What the page says about the breaker."""
    return f"(document.querySelector('#{view} [class^=breaker-]') || {{}}).textContent"


async def open_page(tab: Tab, gateway: Gateway, view: str = "now", size: tuple[int, int] = DESK) -> None:
    """Open a view and wait until there is something to see."""
    await tab.open(f"{gateway.url}/ui#{view}", size)
    await tab.until("document.getElementById('status').textContent === 'ok'")


def origins(tab: Tab) -> set[str]:
    """Whom the page asked, in a short form: what it holds itself comes as data."""
    return {"data:" if url.startswith("data:") else "/".join(url.split("/")[:3]) for url in tab.requested}


async def test_what_is_broken_on_the_page_is_seen_there_and_so_is_that_it_is_well_again(
    tab: Tab, mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway()
    await open_page(tab, gateway, "try")
    assert await tab.value(breaker("backends-try")) == "breaker closed"
    await tab.click("#keep-sending")
    await tab.until("/[1-9][0-9]* good, 0 failed/.test(document.getElementById('answer-status').textContent)")
    await tab.click(button("errors", "try"))
    await tab.until(f"{breaker('backends-try')} === 'breaker open'")
    await tab.until("/[1-9][0-9]* failed/.test(document.getElementById('answer-status').textContent)")
    assert (await gateway.health())["downstream"]["backends"][0]["breaker"] != "closed"
    await tab.click("#tab-now")
    await tab.until(f"/^breaker (open|half open)$/.test({breaker()})")
    assert await tab.until("document.querySelector('#backends .next').textContent")
    await tab.until("/: the breaker is open, it was closed/.test(document.getElementById('changes').textContent)")
    assert "status_503" in await tab.value("document.getElementById('backends').textContent")
    assert await tab.value("document.querySelector('#backends svg').querySelectorAll('rect').length") >= 2
    await tab.click(button("heal"))
    await tab.until(f"{breaker()} === 'breaker closed'")
    await tab.until("document.getElementById('said').textContent.includes('the breaker is closed')")
    await tab.until("document.getElementById('mock-now').textContent.includes('no faults')")

    calls = (await mock.control("GET", "/journal")).json["calls"]
    assert {call["fault"] for call in calls if call["path"] == CHAT_PATH} == {None, "status"}
    assert tab.complaints == []
    assert origins(tab) <= {gateway.url, "data:"}


async def test_what_is_wrong_with_the_gateway_itself_stands_on_every_view(
    tab: Tab, mock: MockModel, start_gateway: StartGateway, running: AsyncExitStack, tmp_path: Path
) -> None:
    canary = await running.enter_async_context(MockModel("canary", tmp_path, {}))
    await canary.faults({"kind": "status", "with": {"status": 500}})
    targets = "{backend: old, weight: 1}, {backend: new, model: canary, weight: 1}"
    text = f"""
backends: {{old: {{url: "{mock.url}"}}, new: {{url: "{canary.url}"}}}}
routes: [{{model: "*", targets: [{targets}], guard: {{min_requests: 3}}}}]
keys: [{{name: team-a, key_env: A_KEY, limits: {{requests_per_day: 1000}}}}]
"""
    file = tmp_path / "gateway.yaml"
    file.write_text(text)
    unheard = {"GATEWAY_LIMITS_URL": "valkey://127.0.0.1:1", "GATEWAY_LIMITS_FALLBACK_SHARE": "1"}
    gateway = await start_gateway(GATEWAY_CONFIG=str(file), A_KEY=KEY, **unheard)
    await tab.open(f"{gateway.url}/ui", DESK)
    notices = "document.getElementById('notices').textContent"
    await tab.until(f"{notices}.includes('The limits of keys cannot be kept beyond this process now')")
    for number in range(40):
        body = CHAT | {"messages": [{"role": "user", "content": f"text {number}"}]}
        await ask(gateway.url + CHAT_PATH, method="POST", body=body, headers={"authorization": f"Bearer {KEY}"})
    await tab.until(f"{notices}.includes('The guard of route * took the traffic of new (canary)')")
    await tab.until("document.getElementById('changes').textContent.includes('new (canary) lost its traffic')")
    assert "lost its traffic" in await tab.value("document.getElementById('guards').textContent")
    file.write_text(text.replace("min_requests: 3", "min_requests: no"))
    await tab.until(
        f"{notices}.includes('The new configuration is wrong, and generation 1 stays in force: GATEWAY_CONFIG')"
    )
    for view in VIEWS:
        await tab.click(f"#tab-{view}")
        assert await tab.value("document.getElementById('notices').offsetHeight")
    file.write_text(text + "# another one\n")
    await tab.until(f"!{notices}.includes('configuration is wrong')")
    assert await tab.value("new URL(document.getElementById('generation').href).pathname") == "/config"
    assert tab.complaints == []


async def test_a_prompt_is_answered_beside_its_explanation(
    tab: Tab, mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway()
    await open_page(tab, gateway, "try")
    await tab.click(button("once", "try"))
    await tab.until("document.getElementById('mock-try').textContent.includes('In force: reset')")
    await tab.click("#send")
    await tab.until("document.getElementById('answer-status').textContent.startsWith('200, complete after')")
    why = await tab.until("(document.querySelector('#why .waterfall') || {}).textContent")
    assert "attempt 1 at backend-1" in why
    assert "attempt 2 at backend-1" in why
    assert "Answered by backend-1 at the second attempt" in await tab.value(
        "document.getElementById('why').textContent"
    )
    headers = await tab.value("document.getElementById('answer-headers').textContent")
    assert all(
        name in headers for name in ("x-request-id", "x-gateway-backend", "x-gateway-attempts2", "server-timing")
    )
    answered = (await ask(f"{gateway.url}{CHAT_PATH}", method="POST", body=CHAT | {"max_tokens": 200})).json
    assert len(await tab.value("document.getElementById('answer').textContent")) > 10
    assert answered["choices"][0]["message"]["content"]
    await tab.until("document.getElementById('mock-try').textContent.includes('no faults')")  # it is used up

    await tab.click(button("cut", "try"))
    await tab.until("document.getElementById('mock-try').textContent.includes('In force: cut')")
    await tab.click("#send")
    await tab.until("document.getElementById('answer-status').className === 'fail'")
    said = await tab.value("document.getElementById('answer-status').textContent")
    # A browser may drop the error event where the broken end of the body arrives together with it.
    assert "The answer ended with an error" in said or "the connection ended before the answer was complete" in said

    await tab.click(button("slow", "try"))
    await tab.until("document.getElementById('mock-try').textContent.includes('In force: latency')")
    await mock.faults({"kind": "latency", "with": {"delay": 60}})  # for longer than a slow browser takes
    await tab.click("#send")
    await tab.until("!document.getElementById('stop').disabled")
    await tab.click("#stop")
    await tab.until("document.getElementById('answer-status').textContent.startsWith('Stopped after')")
    assert tab.complaints == []


async def test_no_name_that_a_caller_chose_becomes_html(tab: Tab, mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    fault = {"kind": "status", "with": {"status": 400, "body": {"error": {"message": EVIL, "code": EVIL}}}}
    for number, request_id in enumerate(EVIL_IDS):
        await mock.faults(*([fault] if number % 2 else []))
        body = CHAT | {"model": EVIL}
        await ask(gateway.url + CHAT_PATH, method="POST", body=body, headers={"x-request-id": request_id})
    await mock.faults()
    await open_page(tab, gateway, "requests")
    await tab.until(f"document.querySelectorAll('#list-table tbody tr').length === {len(EVIL_IDS)}")
    ids = await tab.value("[...document.querySelectorAll('#list-table a')].map(a => a.dataset.id)")
    assert set(ids) >= {each for each in EVIL_IDS if each.strip(".")}
    assert EVIL in await tab.value("document.getElementById('list-table').textContent")
    for number, shown in enumerate(ids):
        await tab.value(f"document.querySelectorAll('#list-table a')[{number}].click()")
        heading = f"document.querySelector('#one h2 code').textContent === {json.dumps(shown)}"
        await tab.until(
            f"!document.getElementById('one').hidden && {heading} && document.querySelector('#one .waterfall')"
        )
        assert EVIL in await tab.value("document.getElementById('one').textContent")
        await tab.value("document.querySelector('#one .back a').click()")
        await tab.until("!document.getElementById('list').hidden && document.querySelector('#list-table a')")
    await tab.value("location.hash = '#requests/%E0%A4%A'")  # nobody's id, and no UTF-8
    await tab.until("document.querySelector('#one .fail')")

    assert await tab.value("document.querySelectorAll('main img, main script, main iframe').length") == 0
    assert await tab.value("document.title") == "LLM gateway"
    assert tab.complaints == []
    assert origins(tab) <= {gateway.url, "data:"}


async def test_the_keyboard_is_enough(tab: Tab, start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    await ask(gateway.url + CHAT_PATH, method="POST", body=CHAT)
    await open_page(tab, gateway)

    async def focused() -> str:
        text: str = await tab.value("document.activeElement.id || document.activeElement.textContent")
        return text

    await tab.press("Tab")
    assert await focused() == "skip"
    await tab.press("Tab")
    assert await focused() == "generation"
    await tab.press("Tab")
    assert await focused() == "tab-now"
    await tab.press("ArrowRight")
    assert await focused() == "tab-requests"
    await tab.until("document.querySelector('#list-table a')")
    await tab.press("End")
    assert await focused() == "tab-try"
    await tab.press("ArrowRight")
    assert await focused() == "tab-now"
    await tab.press("ArrowLeft")
    await tab.press("Home")
    await tab.press("ArrowRight")
    await tab.until("document.querySelector('#list-table a') && !document.getElementById('view-requests').hidden")
    for _ in range(20):
        await tab.press("Tab")
        if await tab.value("document.activeElement.dataset.id"):
            break
    await tab.press("Enter")
    await tab.until("document.activeElement.matches('#one h2')")
    address = await tab.value("location.hash")
    await tab.value("document.getElementById('skip').focus()")
    await tab.press("Enter")
    assert (await focused(), await tab.value("location.hash")) == ("main", address)
    await tab.value("document.querySelector('#one h2').focus()")
    await tab.press("Tab", shift=True)
    assert await focused() == "All requests"
    await tab.press("Enter")
    await tab.until("!document.getElementById('list').hidden")
    await tab.value("document.getElementById('tab-try').focus()")
    await tab.press("Enter")
    await tab.press("Tab")
    assert await focused() == "prompt"
    for _ in range(12):
        await tab.press("Tab")
        if await focused() == "send":
            break
    await tab.press("Enter")
    await tab.until("document.getElementById('answer-status').textContent.startsWith('200, complete')")
    roles = "[...document.querySelectorAll('[role=tab]')].filter(tab => tab.getAttribute('aria-selected') === 'true')"
    assert await tab.value(f"{roles}.map(tab => tab.id)") == ["tab-try"]


async def test_the_same_prompt_as_a_command_gets_the_same_answer(
    tab: Tab, mock: MockModel, start_gateway: StartGateway
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("found no curl: the command was not run")
    gateway = await start_gateway(GATEWAY_API_KEYS=KEY)
    await open_page(tab, gateway, "try")
    await tab.until("!document.getElementById('key-row').hidden")
    await tab.value(f"document.getElementById('gateway-key').value = '{KEY}'")
    await tab.click("#command summary")
    await tab.until("document.getElementById('command-text').textContent")
    await tab.value("document.getElementById('prompt').select()")
    await tab.click("#prompt")
    await tab.write('It\'s $HOME \\ `id` "x" ')
    text = await tab.until("document.getElementById('command-text').textContent")
    assert KEY not in text
    shell = await asyncio.create_subprocess_shell(
        text, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=os.environ | {"GATEWAY_KEY": KEY}
    )
    async with asyncio.timeout(60):
        out, _ = await shell.communicate()
    assert b"200 OK" in out
    assert out.rstrip().endswith(b"data: [DONE]")
    prompt = await tab.value("document.getElementById('prompt').value")
    assert 'It\'s $HOME \\ `id` "x" ' in prompt
    sent = (await mock.control("GET", "/journal")).json["calls"][-1]["fingerprint"]
    await tab.click("#send")
    await tab.until("document.getElementById('answer-status').textContent.startsWith('200, complete')")
    assert (await mock.control("GET", "/journal")).json["calls"][-1]["fingerprint"] == sent
    assert tab.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_a_phone_and_the_readers_colours(
    tab: Tab, mock: MockModel, start_gateway: StartGateway, tmp_path: Path, scheme: str
) -> None:
    long = "m" * 256
    keys = tmp_path / "gateway.yaml"
    limits = "{requests_per_minute: 6000, tokens_per_day: 5000000, max_in_flight: 20}"
    keys.write_text(f"""
backends: {{{"b" * 60}: {{url: "{mock.url}"}}}}
routes: [{{model: "*", targets: [{{backend: {"b" * 60}}}]}}]
keys: [{{name: {"k" * 60}, key_env: A_KEY, models: ["*"], limits: {limits}}}]
""")
    gateway = await start_gateway(GATEWAY_CONFIG=str(keys), A_KEY=KEY)
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "r" * 128}
    await mock.faults({"kind": "status", "with": {"status": 503}, "times": 1})
    await ask(gateway.url + CHAT_PATH, method="POST", body=CHAT | {"model": long}, headers=headers)
    await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await tab.open(f"{gateway.url}/ui", PHONE)
    await tab.until("document.querySelector('#backends .strip')")
    ground = await tab.value("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 23, 29)"}[scheme]
    fits = "document.documentElement.scrollWidth <= innerWidth"
    shown = {
        "now": "document.querySelector('#figures dd')",
        "requests": "document.querySelector('#list-table a')",
        "callers": "document.querySelector('#callers-table .meter')",
        "try": "!document.getElementById('key-row').hidden",
    }
    assert await tab.value("innerWidth") == PHONE[0]
    for view in VIEWS:
        await tab.click(f"#tab-{view}")
        await tab.until(shown[view])
        assert await tab.value(fits), view
    await tab.value(f"location.hash = '#requests/{'r' * 128}'")
    await tab.until("document.querySelector('#one .waterfall')")
    assert await tab.value(fits)
    await tab.value("location.hash = '#try'")
    await tab.value(f"document.getElementById('gateway-key').value = '{KEY}'")
    await tab.click("#send")
    await tab.until("document.querySelector('#why .waterfall')")
    assert await tab.value(fits)
    assert KEY not in await tab.value("document.body.innerText")
    assert tab.complaints == []


async def test_the_admin_key_opens_it(tab: Tab, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(GATEWAY_ADMIN_KEY=ADMIN)
    await tab.open(f"{gateway.url}/ui", DESK)
    await tab.until("!document.getElementById('login').hidden")
    assert await tab.value("document.activeElement.id") == "admin-key"
    assert not await tab.value("document.getElementById('views').offsetHeight")
    await tab.write("another-key")
    await tab.press("Enter")
    await tab.until("document.getElementById('login-error').textContent === 'This is not the admin key.'")
    await tab.write(ADMIN)  # in place of the wrong one, which is selected
    await tab.press("Enter")
    await tab.until("document.getElementById('status').textContent === 'ok'")
    assert await tab.value("document.getElementById('login').hidden")
    assert await tab.value("document.cookie + document.getElementById('admin-key').value") == ""
    await tab.value("location.hash = '#requests'")
    await tab.reload()
    await tab.until("document.getElementById('list-table').textContent.includes('No requests yet')")
    assert tab.complaints == []


async def test_a_gateway_that_is_gone_is_told_and_so_is_that_it_is_back(
    tab: Tab, mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    await open_page(tab, gateway)
    await gateway.kill()
    await tab.until("!document.getElementById('banner').hidden")
    assert "does not answer" in await tab.value("document.getElementById('banner').textContent")
    async with Gateway("again", tmp_path, {"GATEWAY_BACKEND_URLS": mock.url}, port=gateway.port) as again:
        await tab.until("document.getElementById('banner').hidden")
        await tab.until("document.getElementById('mock-now').textContent === ''")  # it knows of no mock model
        assert await again.stop() == 0
        await tab.until("!document.getElementById('banner').hidden")
    assert tab.complaints == []
