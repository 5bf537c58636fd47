"""What the benchmarks share: programs timed in turns, and tables."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def clock(device: str, threads: int) -> float:
    """Seconds; of this thread alone where it is the only one that works."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.thread_time() if device == "cpu" and threads == 1 else time.perf_counter()


def in_turns(
    programs: Mapping[Name, Callable[[], Any]], rounds: int, now: Callable[[], float] = time.process_time
) -> tuple[dict[Name, Any], dict[Name, list[float]]]:
    """Last outputs and seconds of all programs, each round after the first two, each beginning with another one."""
    names, outputs = list(programs), {}
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        first = turn % len(names)  # whoever runs second finds warm memory
        for name in names[first:] + names[:first]:
            begun = now()
            outputs[name] = programs[name]()
            if turn > 1:
                seconds[name].append(now() - begun)
    return outputs, seconds


def medians(functions: list[Callable[[], object]], rounds: int, device: str, threads: int) -> list[float]:
    """Median seconds of each function, in turns."""
    _, seconds = in_turns(dict(enumerate(functions)), rounds, lambda: clock(device, threads))
    return [statistics.median(spent) for spent in seconds.values()]


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the heading."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
