"""Where stored responses live: which replica made a response, for whom, and with which model. Bounded in memory."""

from collections import OrderedDict

MAX_HOMES = 10_000
"""Responses that are known at a time; of whoever has the most, the oldest is forgotten first, and then looked for."""
MAX_ID = 1024
"""Characters; a response with a longer id is not known. LiteLLM's have some hundreds."""


class Home:
    """The home of a response.

    Attributes:
        replica: the id of the one that made it, whatever it is called by now; no other knows it.
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
        self._homes: dict[str, Home] = {}
        self._of_owner: dict[str | None, OrderedDict[str, None]] = {}
        """The ids of each owner who has any, the oldest first; there are no more owners than keys."""

    def __len__(self) -> int:
        return len(self._homes)

    def of(self, response_id: str) -> Home | None:
        """Return the home of a response; None for one that is not known."""
        return self._homes.get(response_id)

    def made(self, response_id: str | None, replica: str, model: str, owner: str | None) -> None:
        """Note that a replica has made a response; what is known already stays where it is, and whose it is."""
        if not response_id or len(response_id) > MAX_ID:
            return
        home = self._homes.get(response_id)
        if home is None:
            self._homes[response_id] = Home(replica, model, owner)
            self._of_owner.setdefault(owner, OrderedDict())[response_id] = None
            if len(self._homes) > self._most:
                longest = max(self._of_owner.values(), key=len)
                self.forget(next(iter(longest)))
        elif (home.replica, home.owner) == (replica, owner):
            self._of_owner[owner].move_to_end(response_id)

    def found(self, response_id: str, replica: str) -> None:
        """Note that a replica knows a response; that says nothing about whose it is."""
        self.made(response_id, replica, "", None)

    def forget(self, response_id: str) -> None:
        """Forget a response that is no more."""
        home = self._homes.pop(response_id, None)
        if home is not None:
            ids = self._of_owner[home.owner]
            del ids[response_id]
            if not ids:
                del self._of_owner[home.owner]
