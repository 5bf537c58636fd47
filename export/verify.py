"""Checks of an exported file in its runtime: the whole model against eager mode."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..contexts import kept

__all__ = [
    "KEY",
    "Run",
    "check_outputs",
    "checked_in",
    "described",
    "first_line",
    "flipped_windows",
    "in_torch",
    "judge",
    "probes",
    "relative_error",
    "returning",
    "runner",
    "torch_pool",
    "torch_unpool",
    "values_of",
    "write_report",
]

# Name of the metadata inside a file.
KEY = "poolskip_zoo"

Run = Callable[[Sequence[Any]], list[Any]]

# Largest error of an output relative to the largest output: float32 sums in another order, float16 weights.
TOLERANCE = {False: 1e-3, True: 3e-2}
# Share of equal classes (or mask pixels) that is asked for where near-ties flip.
AGREEMENT = 0.995


def runner(model: str | Path | bytes, runtime: str) -> Run:
    """Load an ONNX (file or bytes) or OpenVINO model: a function from input arrays to output arrays.

    `runtime` is `onnxruntime`, `onnxruntime-cuda` (on the CPU where there is no GPU) or `openvino`. Raises ImportError,
    which names the extra to install, if it is missing, RuntimeError if it refuses the model.
    """
    try:
        if runtime == "openvino":
            import openvino

            core = openvino.Core()
            read = core.read_model(model if isinstance(model, bytes) else str(model))
            # Some processors would compute in bfloat16 otherwise.
            compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            return lambda arrays: list(compiled(list(arrays)).values())
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=_providers(runtime)
        )
    except ImportError as error:
        raise ImportError(f"checking the file needs {runtime}: pip install 'poolskip-zoo[export]'") from error
    except RuntimeError:
        raise
    except Exception as error:
        # ONNX Runtime's own, which are no RuntimeErrors.
        raise RuntimeError(f"{runtime} refuses the model: {first_line(error)}") from error
    names = [each.name for each in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def returning(model: Any, names: Iterable[str]) -> bytes:
    """An ONNX model that returns these of its values in place of its outputs."""
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return changed.SerializeToString()


def values_of(model: Any, names: Sequence[str], runtime: str) -> Run:
    """Run an ONNX model for the values of these names, which may repeat."""
    different = list(dict.fromkeys(names))
    if not different:
        return lambda arrays: []
    run = runner(returning(model, different), runtime)

    def values(arrays: Sequence[Any]) -> list[Any]:
        found = dict(zip(different, run(arrays), strict=True))
        return [found[name] for name in names]

    return values


def in_torch(module: Callable[..., Any]) -> Run:
    """PyTorch as a runtime: a function from input arrays to output arrays."""

    def run(arrays: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            outputs = tree_leaves(module(*map(torch.from_numpy, arrays)))
        return [each.numpy() for each in outputs if isinstance(each, Tensor)]

    return run


def first_line(error: BaseException | None) -> str:
    """First line of an exception, or its type where it says nothing; of TorchScript's interpreter the last."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return others[-1] if others and "failed in the TorchScript interpreter" in first else first


def _providers(runtime: str) -> list[str]:
    import onnxruntime

    cuda = ["CUDAExecutionProvider"] if runtime == "onnxruntime-cuda" else []
    return [name for name in (*cuda, "CPUExecutionProvider") if name in onnxruntime.get_available_providers()]


def checked_in(runtime: str) -> str:
    """Where a file is really run, name and device: `onnxruntime CPUExecutionProvider` on a machine without a GPU."""
    return "openvino CPU" if runtime == "openvino" else f"onnxruntime {_providers(runtime)[0]}"


def check_outputs(run: Run, reference: Callable[..., Any], inputs: list[tuple[Any, ...]], half: bool) -> dict[str, Any]:
    """Compare all outputs of an exported model with eager mode's, at inputs of several sizes.

    Gives the largest relative error, the share of equal classes and the shapes. Raises RuntimeError if the export fails
    at a size or gives another shape, or there is no number to compare.
    """
    worst, agree, total, shapes, numbers = 0.0, 0, 0, [], []
    for args in inputs:
        given = [list(each.shape) for each in args]
        with torch.no_grad():
            expected = [each for each in tree_leaves(reference(*args)) if isinstance(each, Tensor)]
        try:
            outputs = run([each.numpy() for each in args])
        except Exception as error:
            raise RuntimeError(f"the exported file fails at input {given}: {first_line(error)}") from error
        if len(outputs) != len(expected):
            raise RuntimeError(f"the exported file gives {len(outputs)} outputs, the model {len(expected)}")
        for output, target in zip(outputs, expected, strict=True):
            got = torch.from_numpy(output)
            if got.shape != target.shape:
                raise RuntimeError(
                    f"at input {given} the exported file gives shape {list(got.shape)}, the model {list(target.shape)}"
                )
            worst = max(worst, relative_error(got, target))
            if target.is_floating_point():
                numbers.append(bool(target.isfinite().any()))
            if target.dim() > 1 or not target.is_floating_point():
                same = _classes(got) == _classes(target)
                agree, total = agree + int(same.sum()), total + same.numel()
        shapes.append(given)
    if numbers and not any(numbers):
        raise RuntimeError(
            f"nothing can be compared: the model returns no finite number at inputs {shapes}; give an example for "
            "which it does" + ", or leave half out: float16 ends at 65504" * half
        )
    return {
        "max_relative_error": worst,
        "tolerance": TOLERANCE[half],
        "agreement": agree / total if total else float(worst <= TOLERANCE[half]),
        "inputs": shapes,
    }


def relative_error(got: Tensor, target: Tensor) -> float:
    """Largest difference relative to the largest finite number; of integers and truth values the share that differs.

    It is 0 where infinities and NaN are equal too, infinite where only one side has them.
    """
    different = (got != target) & ~(got.isnan() & target.isnan())
    if not different.any():
        return 0.0
    if not target.is_floating_point():
        return float(different.float().mean())
    scale = target.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=torch.finfo(target.dtype).tiny)
    error = float((got - target)[different].abs().max() / scale)
    return math.inf if math.isnan(error) else error


def _classes(output: Tensor) -> Tensor:
    """Classes of an output: by their scores on the second axis, by the sign of a single one, or as they stand."""
    if not output.is_floating_point():
        return output
    return output.argmax(1) if output.shape[1] > 1 else output > 0


def judge(outputs: dict[str, Any], path: Path, reference: str = "eager mode") -> None:
    """Raise RuntimeError if a file differs from `reference` (for the message) by more than flipped near-ties explain.

    `outputs` is what `check_outputs` found, with what `flipped_windows` did where that was measured.
    """
    error, limit = outputs["max_relative_error"], outputs["tolerance"]
    flipped, before = outputs.get("flipped_windows", 0.0), outputs.get("error_where_flipped", 0.0)
    if error <= limit:
        return
    if math.isinf(error):
        raise RuntimeError(
            f"{path.name} is not kept: NaN or infinities lie elsewhere in its outputs than in {reference}'s at inputs "
            f"{outputs['inputs']}; where a map that is pooled holds some, take lowering='scatter'"
        )
    differs = (
        f"{path.name} is not kept: its outputs differ from {reference}'s by {error:.1e} of the largest (allowed: "
        f"{limit:.0e}) at inputs {outputs['inputs']}, and no near-tie"
    )
    if not flipped:
        raise RuntimeError(f"{differs} flipped")
    if before > limit:
        raise RuntimeError(
            f"{differs} explains it: the first map with a window that flipped differs by {before:.1e} itself"
        )
    if outputs["agreement"] < AGREEMENT:
        raise RuntimeError(
            f"{path.name} is not kept: only {outputs['agreement']:.1%} of the classes equal {reference}'s (required: "
            f"{AGREEMENT:.1%}); {flipped:.2%} of the windows flipped"
        )


def described(
    target: str, blocks: Iterable[Mapping[str, Any]], metadata: Mapping[str, Any] | None = None, **facts: Any
) -> dict[str, Any]:
    """What a report begins with, and a file keeps: version, target or format, lowerings, facts, the user's metadata."""
    from .. import __version__

    used = sorted({block["lowering"] for block in blocks})
    return {"package_version": __version__, "target": target, "lowering": used, **facts, **(metadata or {})}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a JSON-ready report as `<path>.json` beside the exported file."""
    with kept(path.with_name(f"{path.name}.json")) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def flipped_windows(
    ours: Run, theirs: Run, blocks: Sequence[Mapping[str, Any]], inputs: Iterable[Any]
) -> dict[str, float]:
    """Share of pooling windows whose maximum lies elsewhere in two runs, as it may between near-equal values.

    Each run returns the pooled map of each block. `error_where_flipped`: the largest error of an input's first map, in
    the graph's order, with some; where that is small, near-ties are the cause, and not another error before them.
    """
    flipped, total, worst = 0, 0, 0.0
    for arrays in inputs:
        before = flipped
        for *both, block in zip(ours(arrays), theirs(arrays), blocks, strict=True):
            one, other = map(torch.from_numpy, both)
            places = [torch_pool(each.float(), block["window"], block["ceil_mode"])[1] for each in (one, other)]
            different = int((places[0] != places[1]).sum())
            if different and flipped == before:
                worst = max(worst, relative_error(other, one))
            flipped, total = flipped + different, total + places[0].numel()
    return {"flipped_windows": flipped / total if total else 0.0, "error_where_flipped": worst}


def probes(shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    """What an unpooling is compared on, by name: random values, ties and rectified values."""
    random = torch.randn(tuple(shape), generator=generator)
    ties = torch.randint(-2, 3, tuple(shape), generator=generator).float()
    return {"random values": random, "ties": ties, "rectified values": random.relu()}


def torch_pool(x: Tensor, window: list[int], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """torch's own pooling of disjoint windows of (N, C, *spatial), one to three axes: maxima and flat indices."""
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(window) - 1]
    return function(x, window, window, ceil_mode=ceil_mode, return_indices=True)


def torch_unpool(values: Tensor, indices: Tensor, size: list[int]) -> Tensor:
    """torch's own unpooling of (N, C, *pooled), two or three axes, to this spatial size, in the type of `values`."""
    if len(size) == 2:
        unpooled = torch.ops.aten.max_unpool2d(values.float(), indices, size)
    else:
        unpooled = torch.ops.aten.max_unpool3d(values.float(), indices, size, [1] * 3, [0] * 3)
    return unpooled.to(values.dtype)
