"""A backend as a whole, or one of its replicas alone: its outages, and the requests that wait for it."""

from typing import TYPE_CHECKING

from gateway.policy.outage import Outage
from gateway.policy.waiting_room import WaitingRoom

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.policy.waiting_room import WaitingLimit


class Backend:
    """A server we forward to. It outlives generations of the configuration, as its replicas do.

    Args:
        name: as configured.
        outage_wait: seconds that requests wait for the end of an outage.
        limit: of all requests that wait.
        clock: seconds, monotonic.
        released: called with (name, number) when requests that waited are released.

    Attributes:
        outage: the present one.
        bridging: the requests that wait for its end.
        full: the requests that wait because all replicas have as many attempts under way as they may have.
    """

    def __init__(
        self,
        name: str,
        *,
        outage_wait: float,
        limit: "WaitingLimit",
        clock: "Callable[[], float]",
        released: "Callable[[str, int], None]",
    ) -> None:
        self.name = name
        self._limit = limit
        self._clock = clock
        self._released = lambda number: released(name, number)
        self.bridging = WaitingRoom(limit, clock=clock, released=self._released)
        self.full = WaitingRoom(limit, clock=clock)
        self.outage = Outage(wait=outage_wait, clock=clock, over=self.bridging.release, failed=self._hold)
        self._cooling: dict[str, WaitingRoom] = {}

    def _hold(self) -> None:
        """Release nobody any more, and let everybody look again whether to wait on."""
        self.bridging.hold()
        self.bridging.wake_all()

    def cooling(self, model: str) -> WaitingRoom:
        """Return the room of the requests that wait for the end of a cooldown; `forget_cooling` it afterwards."""
        room = self._cooling.get(model)
        if room is None:
            room = self._cooling[model] = WaitingRoom(self._limit, clock=self._clock, released=self._released)
        return room

    def forget_cooling(self, model: str) -> None:
        """Forget the room if nobody is in it."""
        room = self._cooling.get(model)
        if room is not None and not room.queue:
            del self._cooling[model]

    def cooldown_changed(self, model: str | None, over: bool) -> None:  # noqa: FBT001 - of Cooldown.changed
        """Tell those who wait that a cooldown has ended or changed; model None: of every model."""
        for room in list(self._cooling.values()) if model is None else filter(None, [self._cooling.get(model)]):
            if over:
                room.release()
            else:
                room.hold()
                room.wake()
