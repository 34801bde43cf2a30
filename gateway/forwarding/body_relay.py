"""A backend's answer on its way to the caller, passed through: bytes in, the same bytes out, whatever they are."""

from typing import TYPE_CHECKING

from gateway.forwarding.stream_relay import Held, stalled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.backend.client import Exchange
    from gateway.errors import Stalled
    from gateway.phase_timer import PhaseTimer
    from gateway.policy.byte_budget import Share


class BodyRelay:
    """Passes a body on as it comes.

    Args:
        exchange: the answer, its headers checked.
        timer: of the attempt.
        idle: seconds between two reads.
        share: holds the bytes that wait for commit.
    """

    def __init__(self, exchange: "Exchange", timer: "PhaseTimer", *, idle: float, share: "Share") -> None:
        self._exchange = exchange
        self._timer = timer
        self._idle = idle
        self._share = share

    async def until_commit(self, limit: int, *, whole: bool) -> bytes:
        """Return the first bytes of the body, or all of it; none where it is empty.

        Raises:
            Stalled: nothing came for the idle timeout.
            InvalidResponse: it was cut off, or cannot be decoded; AnswerTooLarge: it exceeds `limit` bytes.
            GatewayOverloaded: the share cannot hold it.
        """
        held = Held(self._share, limit, f"The backend's answer is larger than {limit} bytes.")
        await held.add(await self._read())
        if whole:
            await self.pass_on(held.add)
        return held.joined()

    async def pass_on(self, write: "Callable[[bytes], Awaitable[None]]") -> None:
        """Pass the rest on as it arrives; while `write` waits for a slow caller, the idle timer is paused.

        Raises:
            Stalled: nothing came for the idle timeout.
            InvalidResponse: it was cut off, or cannot be decoded.
        """
        while not self._exchange.at_end:
            if data := await self._read():
                await write(data)

    async def _read(self) -> bytes:
        self._timer.limit(self._idle, self._stalled)
        data = await self._exchange.read()
        self._timer.pause()
        self._exchange.read_less(len(data))
        return data

    def _stalled(self) -> "Stalled":
        return stalled(self._idle)
