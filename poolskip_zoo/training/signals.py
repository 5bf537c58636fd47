"""SIGTERM, by which schedulers ask for the machine some seconds before they take it, and Ctrl-C."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def hold_signals() -> Iterator[Callable[[], bool]]:
    """Keep SIGTERM and Ctrl-C back until the context ends, where the former handler gets them.

    By default the process ends by SIGTERM, and Ctrl-C raises KeyboardInterrupt; a second Ctrl-C does so at once. Only
    the main thread can do so; in another one, or where the process ignores a signal, nothing is kept back.

    Yields:
        A function: whether a signal is kept back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    former = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    # None: a handler not of Python's, which stays
    former = {each: handler for each, handler in former.items() if handler not in (None, signal.SIG_IGN)}
    kept: set[int] = set()

    def keep(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and number in kept:
            kept.discard(number)
            signal.signal(number, former[signal.SIGINT])
            signal.raise_signal(number)
            return
        kept.add(number)
        if number == signal.SIGINT:  # unbuffered: what is interrupted may be writing to the stream itself
            os.write(2, b"\nstopping with a checkpoint after this step; Ctrl-C again stops at once\n")

    for each in former:
        signal.signal(each, keep)
    try:
        yield lambda: bool(kept)
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)
        for number in sorted(kept, reverse=True):  # SIGTERM first: Ctrl-C raises, and nothing would follow it
            signal.raise_signal(number)
