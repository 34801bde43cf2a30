"""The parent of workers: opens the port for each, starts them, starts anew what dies, and hands signals on."""

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gateway import __version__
from gateway.server.listener import held_sockets, listening_sockets
from gateway.workers.channel import Channel
from gateway.workers.child import Child
from gateway.workers.parent_store import KINDS, Ledgers, Values
from gateway.workers.sharing import Sharing
from gateway.workers.whole import Whole
from gateway.workers.worker import LAST_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gateway.config import KeyConfig
    from gateway.settings import Settings
    from gateway.workers.sharing import Shares

BACK_WITHIN = 1.0
"""Seconds after a worker's death for which callers wait for the next one; then its place at the port is closed."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a worker that died is started anew: the first time, and at most; doubled each time."""
BURIED_EVERY = 1.0
"""Seconds between two looks for processes that dead workers have left behind, and that have ended."""
LAST_REPORT = 1.0
"""Seconds in which what a worker said before its end is read."""
HEALTHY_AFTER = 30.0
"""Seconds after which a worker is one that works: its next death is a first one."""
WRONG_SETTINGS, FAILED = 2, 1
"""The exit codes of a worker whose settings are wrong: another one would fail as well; and of one that failed."""
BY_SIGNAL = 128
"""What shells add to a signal's number, as an exit code."""

_log = logging.getLogger("gateway")


class Parent:
    """Runs workers until it is told to stop.

    Each has listening sockets of its own (`SO_REUSEPORT`), among which the system spreads new connections. The parent
    opens them when a worker is ready to accept, keeps them, and hands them over. So nothing is lost when one dies and
    the next is there within `BACK_WITHIN`; after that its sockets are closed, and nobody waits in a queue without an
    end. The parent holds the port as long as it runs, so that no other gateway shares it unnoticed.

    Until one of them serves, the end of a worker is the end of all, as that of one process is.

    Args:
        settings: host, port, grace, how many workers, and where what they use of a day is kept.
        keys: of callers, at the start.
        command: of a worker, without its arguments.

    Attributes:
        children: the workers' places.
    """

    def __init__(
        self,
        settings: "Settings",
        keys: "Iterable[KeyConfig]" = (),
        *,
        command: tuple[str, ...] = (sys.executable, "-m", "gateway", "worker"),
    ) -> None:
        self._host = settings.host
        self._port = settings.port
        self._grace = settings.gateway_shutdown_delay + settings.gateway_shutdown_grace
        self._count = settings.workers
        self._command = command
        self._stopping = asyncio.Event()
        self._code = 0
        self._has_served = False
        self._starting = 0
        self.children: list[Child] = []
        self._sharing = Sharing(settings, self.children)
        self._ledgers = Ledgers(settings.gateway_state_dir if settings.gateway_limits_url is None else None)
        self._ledgers.expect(keys)
        self._whole = Whole(self.children, used=self._ledgers.used)
        values = {kind: Values() for kind in KINDS}
        self._answers: dict[str, Callable[[Child, Any], Any]] = {
            "leave": lambda child, _: self._let_go(child),
            "short": lambda _child, _: self._sharing.short(),
            "hint": self._tell_others,
            "hint_to": lambda _child, data: self.children[data[0] - 1].tell("hint", data[1]),
            "ledgers": lambda child, reports: self._ledgers.exchange(child.number, reports),
            "publish": lambda _child, data: values[data[0]].publish(*data[1:]),
            "look_up": lambda _child, data: values[data[0]].look_up(data[1]),
        }

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code. Raises: OSError, the port is not available."""
        holding = held_sockets(self._host, self._port)
        self._port = holding[0].getsockname()[1]
        async with self._ledgers:
            await self._run_workers()
        for each in holding:
            each.close()
        return self._code

    async def _run_workers(self) -> None:
        self.children += [Child(number) for number in range(1, self._count + 1)]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, signal.SIGTERM)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        _log.info("gateway %s runs %d workers on port %d", __version__, self._count, self._port)
        beside = [loop.create_task(self._whole.watch()), loop.create_task(self._bury_again_and_again())]
        await asyncio.gather(*map(self._keep_alive, self.children))
        for task in beside:
            task.cancel()

    def _open_place(self) -> list[socket.socket]:
        return listening_sockets(self._host, self._port, shared=True)

    def _stop(self, number: signal.Signals) -> None:
        """Tell the workers to stop; a second time they do at once."""
        if not self._stopping.is_set():
            self._stopping.set()
            for child in self.children:
                child.close_place()  # each worker's own copies stay open
            asyncio.get_running_loop().call_later(self._grace + LAST_WORDS, self._hand_on, signal.SIGKILL)
        self._hand_on(number)

    def _hand_on(self, number: signal.Signals) -> None:
        for child in self.children:
            child.send(number)

    def _reload(self) -> None:
        """Have the workers read their configuration anew. One that does not serve yet may not know the signal."""
        for child in self.children:
            if child.serves:
                child.send(signal.SIGHUP)
            else:
                child.behind = True

    async def _keep_alive(self, child: Child) -> None:
        """Run one worker after the other in a place, until the stop."""
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began = loop.time()
            try:
                code = await self._run_worker(child)
            except OSError as error:  # no process, or no memory
                code = FAILED
                if not child.deaths:
                    _log.error("worker %d cannot be started: %s", child.number, error)
            if self._stopping.is_set():
                self._code = self._code or code
                return
            if not self._has_served or (code == WRONG_SETTINGS and not any(each.serves for each in self.children)):
                self._code = code or FAILED  # it said what is wrong
                self._stop(signal.SIGTERM)
                return
            child.deaths = 1 if loop.time() - began >= HEALTHY_AFTER else child.deaths + 1
            if child.deaths == 1 or child.has_served or code > BY_SIGNAL:  # else it has said itself what is wrong
                _log.error("worker %d ended with code %d; a new one is started", child.number, code)
            if child.closing is None:
                child.closing = loop.call_later(BACK_WITHIN, child.close_place)
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (child.deaths - 1))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause if child.deaths > 1 else 0)

    async def _run_worker(self, child: Child) -> int:
        """Start a worker, and wait for its end; return its exit code."""
        questions, its_questions = socket.socketpair(socket.AF_UNIX)
        handing, its_handing = socket.socketpair(socket.AF_UNIX)
        with its_questions, its_handing, handing:
            child.forget_in_flight()
            ends = its_questions.fileno(), its_handing.fileno(), child.count_descriptor
            arguments = (str(child.number), *map(str, ends))
            self._starting += 1
            try:
                child.process = await asyncio.create_subprocess_exec(
                    *self._command, *arguments, pass_fds=ends, process_group=0
                )
            except BaseException:
                questions.close()
                raise
            finally:
                self._starting -= 1
            its_questions.close()
            its_handing.close()
            channel = child.channel = Channel(lambda what, data: self._answer_to(child, handing, what, data))
            await channel.open(questions)
            if self._stopping.is_set():  # the signal came before there was a process
                child.send(signal.SIGTERM)
            code = await child.process.wait()
            in_vain = self._stopping.is_set() and not child.serves  # it was told to stop before it had begun
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_REPORT):  # what it said before it ended may not have been read yet
                    await channel.closed.wait()
        child.channel, child.has_served, child.serves = None, child.serves, False
        channel.close()
        self._sharing.ended(child)
        self._ledgers.ended(child.number)
        if not self._stopping.is_set():
            self._whole.ended(child)
        if in_vain and self._has_served:
            return 0
        return code if code >= 0 else BY_SIGNAL - code

    async def _bury_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(BURIED_EVERY)
            if not self._starting:  # else there may be a worker that is not known yet
                self._bury()

    def _bury(self) -> None:
        """Wait for processes that dead workers have left to this one, which is the first of a container.

        They may end long after their worker, and one of its own that has ended hides those behind it for a while.
        """
        own = {child.process.pid for child in self.children if child.process is not None}
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in own:
                os.waitid(os.P_PID, ended.si_pid, os.WEXITED | os.WNOHANG)

    async def _answer_to(self, child: Child, handing: socket.socket, what: str, data: Any) -> Any:  # noqa: ANN401 - JSON
        if what == "sockets":
            return self._hand_over(child, handing)
        if what in self._whole.answers:
            return await self._whole.answers[what](data)
        return self._answers[what](child, data)

    def _let_go(self, child: Child) -> bool:
        """Close the place of a worker that somebody else has told to stop; False: no other could serve its callers."""
        if self._stopping.is_set() or not any(
            other.serves and other.sockets for other in self.children if other is not child
        ):
            return False
        child.close_place()
        return True

    def _tell_others(self, child: Child, data: Any) -> None:  # noqa: ANN401 - JSON
        for other in self.children:
            if other is not child:
                other.tell("hint", data)

    def _hand_over(self, child: Child, handing: socket.socket) -> "tuple[Shares, int] | None":
        """Give a worker that is ready its sockets; return its shares, and the number of the configuration in force.

        None: there is nothing more to do.
        """
        if self._stopping.is_set():
            return None
        if child.closing is not None:
            child.closing.cancel()
            child.closing = None
        if not child.sockets:
            child.sockets = self._open_place()
        socket.send_fds(handing, [b"\0"], [listening.fileno() for listening in child.sockets])
        child.serves, child.silent_looks = True, 0
        self._has_served = True
        if child.behind:
            child.behind = False
            child.send(signal.SIGHUP)
        self._tell_others(child, ["joined", child.number])
        return self._sharing.first(child), self._whole.generation
