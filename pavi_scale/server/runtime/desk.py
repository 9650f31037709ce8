"""Reaching the scheduler as soon as it is back."""

from __future__ import annotations

from distributed import Client

ATTEMPT = 1.0  # seconds of one attempt to reach a scheduler that is away


class Desk:
    """Gives a client that is connected to the scheduler: the engine's own, or a second one while that has lost it.

    Dask's client waits ever longer between its attempts to connect again, up to as long as the scheduler has been away so far, and so does each call that it
    makes meanwhile. A fresh one asks at once.

    Args:
        client: The engine's client.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._second: Client | None = None

    async def client(self) -> Client:
        """A connected client; called in the event loop of the engine's.

        Raises:
            OSError: The scheduler is away.
        """
        if self._client.status != "connecting":
            return self._client
        if self._second is not None and self._second.status != "running":
            await self.close()
        if self._second is None:
            address, security = self._client.scheduler.address, self._client.security
            self._second = Client(address, security=security, timeout=ATTEMPT, asynchronous=True, set_as_default=False)
            await self._second  # kept before: an attempt that is cancelled must be ended, too
        return self._second

    async def close(self) -> None:
        """End the second client, if there is one; what it started is given up."""
        second, self._second = self._second, None
        if second is not None:
            await second.close()
