"""The exchange of one bucket under way: hop by hop, on whatever carries it, to its mean or what went wrong."""

from __future__ import annotations

import time
from typing import Any

from torch.futures import Future

from distrobust.comm.bucket import Bucket, Exchange, Mean
from distrobust.comm.transport import Local, Request, Transport


class Job:
    """`done`: there is a `mean`, or an `error`.

    An error is kept as a value: an exception in a callback would reach the caller as text only. `decode_s`: host time
    from the last answer to the mean.
    """

    def __init__(self, bucket: Bucket, exchange: Exchange, num_hops: int, transport: Transport) -> None:
        self.bucket = bucket
        self.hops_left = num_hops
        self.mean: Mean | None = None
        self.error: Exception | None = None
        self.decode_s = 0.0
        device = bucket.flat.device
        self.done: Future[Any] = Future(devices=[device] if device.type == "cuda" else None)
        self._exchange = exchange
        self._transport = transport
        self._hop = self._issue(next(exchange))

    def wait(self) -> None:
        """For the hop under way."""
        self._hop.wait()

    def advance(self) -> None:
        """Takes what came back and issues the next hop. Called in the same order on all ranks."""
        self._hop = self._issue(self._exchange.send(self._hop.value()))

    def _issue(self, request: Request | Local) -> Future[Any]:
        self.hops_left -= 1
        hop = self._transport.issue(request)
        if self.hops_left == 0:
            hop.then(self._finish)
        elif self._transport.chains:
            hop.then(self._chain)
        return hop

    def _chain(self, hop: Future[Any]) -> None:
        try:
            self._issue(self._exchange.send(hop.value()))
        except Exception as error:
            self._close(error)

    def _finish(self, hop: Future[Any]) -> None:
        error: Exception | None = None
        try:
            received, started = hop.value(), time.perf_counter()
            self._exchange.send(received)
        except StopIteration as result:
            self.mean = result.value
            self.decode_s = time.perf_counter() - started
        except Exception as failed:
            error = failed
        self._close(error)

    def _close(self, error: Exception | None) -> None:
        self.error = error
        self.done.set_result(self.bucket.flat)
