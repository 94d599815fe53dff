"""A call that tells how far it is, as a generator."""

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TypeVar

Told = TypeVar("Told")
Result = TypeVar("Result")


class _Stopped(Exception):
    """Nobody waits for the result any more."""


def stream(call: Callable[[Callable[[Told], None]], Result]) -> Generator[Told, None, Result]:
    """`call(tell)` in a thread of its own: yields what it tells, returns what it returns, raises what it raises.

    Closing the generator makes the next `tell` raise, and waits until the call has ended of it. What is told while the
    generator's user is busy is passed over, but for the last.
    """
    news: deque[Told] = deque(maxlen=1)
    changed, stopped = threading.Event(), threading.Event()
    result: Future[Result] = Future()

    def tell(what: Told) -> None:
        if stopped.is_set():
            raise _Stopped
        news.append(what)
        changed.set()

    def work() -> None:
        try:
            result.set_result(call(tell))
        except BaseException as error:  # handed to who waits for it
            result.set_exception(error)
        changed.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            if news:
                yield news.pop()
            elif result.done():
                return result.result()
            else:
                changed.wait()
                changed.clear()
    finally:
        stopped.set()
        thread.join()
