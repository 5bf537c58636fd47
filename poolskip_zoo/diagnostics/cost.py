"""What a model costs: parameters, multiply-accumulates, latency."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_parameters", "measure_latency"]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters.

    Args:
        model: any module.

    Returns:
        Elements of all parameters, each counted once.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products in one forward pass, counted without computing it.

    Args:
        model: any module; it is not changed.
        input_size: channels and spatial size of one input.

    Returns:
        Half of the floating-point operations that torch's counter reports; pooling and unpooling count nothing.
    """
    model = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2


def measure_latency(models: list[nn.Module], input_size: tuple[int, ...], rounds: int = 7) -> list[float]:
    """Median time of one forward pass at batch 1, of several models in turn, so that they share the machine's mood.

    Args:
        models: modules on the CPU; they are put into evaluation mode.
        input_size: channels and spatial size of one input.
        rounds: timings per model, after a first that does not count.

    Returns:
        Milliseconds, one for each model.
    """
    # Here, since it looks for a CUDA compiler and warns where there is none.
    from torch.utils.benchmark import Timer

    x = torch.rand(1, *input_size)
    timers = [
        Timer("with torch.inference_mode(): model(x)", globals={"torch": torch, "model": model.eval(), "x": x})
        for model in models
    ]
    times = [[timer.timeit(1).median * 1e3 for timer in timers] for _ in range(rounds + 1)][1:]
    return [sorted(column)[rounds // 2] for column in zip(*times, strict=True)]
