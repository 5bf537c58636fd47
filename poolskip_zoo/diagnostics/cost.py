"""What a model costs: parameters, multiply-accumulates, latency."""

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_parameters", "measure_latency"]


def count_parameters(model: nn.Module) -> int:
    """Number of elements of all parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products in one forward pass, counted without computing it.

    `input_size` is (C, *spatial). Half of what torch's counter reports: pooling and unpooling count nothing.
    """
    model = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2


def measure_latency(programs: Sequence[Callable[[], object]], rounds: int = 7) -> list[float]:
    """Median milliseconds of each of several programs in turn, so that they share the machine's mood.

    `rounds` are the timings per program, after two that do not count.
    """
    times: list[list[float]] = [[] for _ in programs]
    pairs = list(zip(programs, times, strict=True))
    with torch.inference_mode():
        for turn in range(rounds + 2):
            first = turn % len(pairs)  # whoever runs second finds warm memory
            for program, spent in pairs[first:] + pairs[:first]:
                begun = time.perf_counter()
                program()
                if turn > 1:
                    spent.append(1e3 * (time.perf_counter() - begun))
    return [median(spent) for spent in times]
