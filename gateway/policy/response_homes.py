"""Where stored responses live: which replica made a response, for whom, and with which model. Bounded in memory."""

from collections import OrderedDict

MAX_HOMES = 10_000
"""Responses that are known at a time; the oldest is forgotten first, and then looked for."""
MAX_ID = 1024
"""Characters; a response with a longer id is not known. LiteLLM's have some hundreds."""


class Home:
    """The home of a response.

    Attributes:
        replica: the name of the one that made it; no other knows it.
        model: what that was asked for; "" where it has only been found there.
        owner: the key that it was made for; None: anybody may use it.
    """

    __slots__ = ("model", "owner", "replica")

    def __init__(self, replica: str, model: str, owner: str | None) -> None:
        self.replica = replica
        self.model = model
        self.owner = owner


class ResponseHomes:
    """The homes of the responses that were made or found lately."""

    def __init__(self, most: int = MAX_HOMES) -> None:
        self._most = most
        self._homes: OrderedDict[str, Home] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def of(self, response_id: str) -> Home | None:
        """Return the home of a response; None for one that is not known."""
        return self._homes.get(response_id)

    def made(self, response_id: str | None, replica: str, model: str, owner: str | None) -> None:
        """Note that a replica has made a response."""
        if response_id and len(response_id) <= MAX_ID:
            self._homes[response_id] = Home(replica, model, owner)
            self._homes.move_to_end(response_id)
            if len(self._homes) > self._most:
                self._homes.popitem(last=False)

    def found(self, response_id: str, replica: str) -> None:
        """Note that a replica knows a response; that says nothing about whose it is."""
        if response_id not in self._homes:
            self.made(response_id, replica, "", None)

    def forget(self, response_id: str) -> None:
        """Forget a response that is no more."""
        self._homes.pop(response_id, None)
