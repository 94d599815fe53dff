"""A call that tells how far it is, as a generator."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

Told = TypeVar("Told")
Result = TypeVar("Result")


class _Stopped(Exception):
    """Nobody waits for the result any more."""


def stream(call: Callable[[Callable[[Told], None]], Result]) -> Generator[Told, None, Result]:
    """`call(tell)` in a thread of its own: yields what it tells, returns what it returns, raises what it raises.

    Closing the generator makes the next `tell` raise, and waits until the call has ended of it. What is told while the
    generator's user is busy is passed over, but for the last.
    """
    news: queue.Queue[tuple[str, Any]] = queue.Queue()
    stopped = threading.Event()

    def tell(what: Told) -> None:
        if stopped.is_set():
            raise _Stopped
        news.put(("told", what))

    def work() -> None:
        try:
            news.put(("returned", call(tell)))
        except BaseException as error:  # handed to who waits for it
            news.put(("raised", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, what = news.get()
            while kind == "told" and not news.empty():
                kind, what = news.get()
            if kind == "returned":
                return what
            if kind == "raised":
                raise what
            yield what
    finally:
        stopped.set()
        thread.join()
