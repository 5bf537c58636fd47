"""SIGTERM, by which schedulers ask for the machine some seconds before they take it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def hold_sigterm() -> Iterator[Callable[[], bool]]:
    """Keep SIGTERM back until the context ends, where the former handler gets it: by default the process ends by it.

    Only the main thread can do so; in another one, or where the process ignores SIGTERM, nothing is kept back.

    Yields:
        A function: whether a SIGTERM is kept back.
    """
    former = signal.getsignal(signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    if not main or former is None or former == signal.SIG_IGN:  # None: a handler not of Python's, which stays
        yield lambda: False
        return
    kept = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: kept.set())
    try:
        yield kept.is_set
    finally:
        signal.signal(signal.SIGTERM, former)
        if kept.is_set():
            signal.raise_signal(signal.SIGTERM)
