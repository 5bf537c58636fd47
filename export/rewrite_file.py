"""One ONNX file: its runs, the proof of its unpoolings, its rewritten form, and the checks of that."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import inliner, version_converter
from onnx.reference import ReferenceEvaluator
from onnxscript import ir, optimizer

from . import verify
from .rewrite_cut import Seen, cases, cut
from .rewrite_inputs import check_size, made_up, open_axes
from .rewrite_match import NoUnpooling, Unpooling, find, named
from .rewrite_write import write
from .targets import Target

__all__ = ["File"]

_Arrays = Sequence[np.ndarray]
_GIVE = "give a size that it runs at (--size, size=), or arrays, rewrite_onnx(…, example=[…])"


class File:
    """A file, runs of it, and its rewritten form."""

    def __init__(self, source: Path, size: Sequence[int] | None, example: _Arrays | None) -> None:
        self.name, self.original, self.engine = source.name, _load(source), "onnxruntime"
        self.model = ir.from_proto(self.original)
        self.graph = self.model.graph
        constants = {value.name for value in self.original.graph.initializer}
        self.inputs = [value for value in self.original.graph.input if value.name not in constants]
        self.open_sizes = any(open_axes(value) - {0} for value in self.inputs)
        if example is not None and size is not None:
            raise ValueError(f"size={tuple(size)!r}: the arrays of example= have their own; give one of the two")
        if example is not None and (not isinstance(example, list | tuple) or len(example) != len(self.inputs)):
            names = ", ".join(value.name for value in self.inputs)
            raise ValueError(f"example: {self.name} takes a list of {len(self.inputs)} arrays, of {names}")
        if size is not None:
            check_size(self.inputs, size, self.name)
        self.given, self.size = [list(example)] if example is not None else None, size
        self.written: list[Unpooling] = []
        self.proto = self.original

    def rewrite(self, choice: Target, lowering: str | None) -> list[dict[str, Any]]:
        """Prove all unpoolings, write their new forms, and say what was done."""
        if not choice.dynamic and any(open_axes(value) for value in self.inputs):
            raise ValueError(
                f"{self.name} leaves sizes open, and this target takes only fixed sizes; fix them first, for example "
                "with python -m onnxruntime.tools.make_dynamic_shape_fixed"
            )
        self.found = find(self.graph, lowering == "scatter")
        if not self.found:
            raise ValueError(
                f"{self.name} holds no MaxUnpool, and no scatter by a MaxPool's indices: there is nothing to rewrite"
            )
        self._run_original(lowering == "scatter")
        blocks, replaced = [], dict[Any, Any]()
        for unpooling in self.written:
            ends: Any = (unpooling.x, unpooling.values) if unpooling.pooling else unpooling.node.inputs[:1]
            for value in ends:
                if value.dtype is None:
                    value.dtype = ir.DataType.from_numpy(self.seen[value.name].dtype)
            reason, dims, ceil_mode, window = None, [], False, []
            wanted = "scatter"
            if unpooling.pooling is not None:
                window, ceil_mode = unpooling.window, unpooling.ceil_mode(self.seen)
                dims = self._dims(self.seen[unpooling.x.name])
                wanted = choice.choose(window, lowering)
                reason = None if wanted == "scatter" else unpooling.misfit(self.seen, self.open_sizes)
            used = "scatter" if reason else wanted
            # Before it is written: its values are renamed then.
            entry = {"name": unpooling.output.name, "source": named(unpooling.node), "lowering": used, "window": window}
            write(self.graph, unpooling, used, dims, ceil_mode, replaced)
            blocks.append({**entry, "ceil_mode": ceil_mode, "own": unpooling.own, "reason": reason})
        self.replaced = replaced
        optimizer.remove_unused_nodes(self.model)
        self.proto = ir.to_proto(self.model)
        for node in self.proto.graph.node:
            # Older versions of the pass leave a name of no characters, which OpenVINO takes for an output.
            while node.op_type == "MaxPool" and not node.output[-1]:
                del node.output[-1]
        return blocks

    def _dims(self, seen: Any) -> list[int | None]:
        """Sizes that are fixed, as far as runs tell."""
        dims = seen.dims if len(seen.shapes) > 1 or not any(map(open_axes, self.inputs)) else [None] * len(seen.dims)
        return [*dims[:2], *[None] * len(dims[2:])] if self.open_sizes else dims

    def _run_original(self, lenient: bool) -> None:
        """Run the file where every unpooling is one, and prove them there."""
        choices = [self.given] if self.given else list(made_up(self.inputs, self.size))
        # ONNX Runtime 1.18 ends the process where a MaxUnpool's indices lie outside, as they do at sizes that the
        # windows do not divide if it has no output_shape.
        unpools = [each.node for each in self.found if each.node.op_type == "MaxUnpool" and len(each.node.inputs) < 3]
        if unpools and len(choices) > 1:
            choices = choices[1:]
            windows = [list(node.attributes["kernel_shape"].value) for node in unpools]
            if any(32 % size for window in windows for size in window):
                raise ValueError(
                    f"{self.name} has MaxUnpool without output_shape, whose windows {windows} would not divide made-up "
                    f"sizes; {_GIVE}"
                )
        failure: Exception | None = None
        for arrays in choices:
            try:
                self._observe(arrays)
                self._prove(lenient)
                return
            except NoUnpooling as error:
                failure = error
            except _Refused as error:
                failure = failure or error
        raise ValueError(f"{self.name}: {failure}") from failure

    def _observe(self, inputs: list[list[np.ndarray]]) -> None:
        """Note types and sizes of all values that matter, pooled maps and outputs of the original."""
        given, ends = ([value.name for value in side] for side in (self.inputs, self.original.graph.output))
        watched = [value.name for each in self.found for value in each.watched() if value.name not in given]
        names = list(dict.fromkeys([*ends, *watched]))
        run, self.engine = _start(verify.returning(self.original, names))
        pooled = {each.x.name for each in self.found if each.pooling is not None}
        self.arrays, self.outputs, self.maps = inputs, list[list[np.ndarray]](), list[dict[str, np.ndarray]]()
        facts: list[dict[str, tuple[Any, tuple[int, ...]]]] = []
        for arrays in inputs:
            sizes = [list(each.shape) for each in arrays]
            try:
                results = run(arrays)
            except Exception as error:
                line = verify.first_line(error)
                raise _Refused(f"it does not run on inputs of shape {sizes} ({line}); {_GIVE}") from error
            if any(each.size == 0 for each in results):
                # Nothing would be compared.
                raise _Refused(f"a map is empty on inputs of shape {sizes}; {_GIVE}")
            values = dict(zip([*given, *names], [*arrays, *results], strict=True))
            self.outputs.append([values[name] for name in ends])
            self.maps.append({name: values[name] for name in pooled})
            facts.append({name: (value.dtype, value.shape) for name, value in values.items()})
        types = {name: dtype for name, (dtype, _) in facts[0].items()}
        self.seen = {name: Seen(dtype, tuple(each[name][1] for each in facts)) for name, dtype in types.items()}

    def _prove(self, lenient: bool) -> None:
        self.written = []
        for each in self.found:
            try:
                each.prove(self.graph, self.seen, lambda model: _start(model)[0], self.original)
                self.written.append(each)
            except NoUnpooling:
                # With an index tensor asked for, a scatter of any kind may stay.
                if not lenient or each.node.op_type == "MaxUnpool":
                    raise
        if not self.written:
            raise NoUnpooling("none of its scatters is an unpooling")

    def describe(self, target: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        """Facts for the report; those of the target go into the file, beside its own metadata."""
        facts = verify.described(target, blocks)
        entry = next((each for each in self.proto.metadata_props if each.key == verify.KEY), None)
        entry = entry or self.proto.metadata_props.add()
        entry.key, entry.value = verify.KEY, json.dumps({**json.loads(entry.value or "{}"), **facts})
        opset = next(each.version for each in self.proto.opset_import if each.domain in ("", "ai.onnx"))
        return {**facts, "opset": opset}

    def check_blocks(self, blocks: list[dict[str, Any]], runtime: str) -> int:
        """Compare every unpooling with the original's."""
        compared = 0
        for unpooling, block in zip(self.written, blocks, strict=True):
            if unpooling.proof is None:
                continue
            original, sizes = unpooling.proof
            ends = [self.replaced.get(value, value) for value in unpooling.ends()]
            model, _ = cut(self.graph, ends, [self.replaced[unpooling.output]], self.seen, self.proto, whole=True)
            expected, run = _start(original)[0], verify.runner(model.SerializeToString(), runtime)
            for case, arrays in cases(unpooling.ends(), self.seen, sizes):
                compared += 1
                before, after = expected(arrays)[0], run(arrays[: len(ends)])[0]
                if not np.array_equal(before, after):
                    raise RuntimeError(
                        f"{block['source']}: the rewritten form {block['lowering']!r} differs from the original in "
                        f"{int((before != after).sum())} of {before.size} values on {case}"
                    )
        return compared

    def check_outputs(self, run: Any) -> dict[str, Any]:
        """Compare the outputs with the original's."""
        outputs, half = iter(self.outputs), any(each.dtype == np.float16 for each in self.outputs[0])
        inputs = [tuple(map(torch.from_numpy, arrays)) for arrays in self.arrays]
        return verify.check_outputs(run, lambda *_: [torch.from_numpy(each) for each in next(outputs)], inputs, half)

    def flips(self, blocks: list[dict[str, Any]], runtime: str) -> dict[str, float]:
        """What `verify.flipped_windows` finds beside the original."""
        given = {value.name for value in self.inputs}
        watched = [
            (each.x.name, block)
            for each, block in zip(self.written, blocks, strict=True)
            if block["lowering"] != "scatter" and each.x.name not in given
        ]
        names, maps = [name for name, _ in watched], iter(self.maps)

        def original(_: Any) -> list[np.ndarray]:
            found = next(maps)
            return [found[name] for name in names]

        run = verify.values_of(self.proto, names, runtime)
        return verify.flipped_windows(original, run, [block for _, block in watched], self.arrays)


class _Refused(RuntimeError):
    """A file that does not run on given inputs."""


def _load(source: Path) -> Any:
    """The model in one piece, without local functions, of operator set 11 at least."""
    if not source.is_file():
        raise ValueError(f"no such file: {source}")
    try:
        model = onnx.load(str(source), load_external_data=False)
    except Exception as error:
        raise ValueError(f"{source} is not an ONNX file: {verify.first_line(error)}") from error
    if not model.graph.node:
        raise ValueError(f"{source} is not an ONNX file: it holds no graph")
    try:
        onnx.load_external_data_for_model(model, str(source.parent))
    except Exception as error:
        raise ValueError(
            f"{source} has its weights in another file: put that next to it ({verify.first_line(error)})"
        ) from error
    if model.ByteSize() >= 2**31:
        raise ValueError(f"{source.name} has {model.ByteSize() / 1e9:.1f} GB with its weights: expected at most 2 GB")
    # Since version 4 of the format constants need not be inputs as well.
    model.ir_version = max(model.ir_version, 4)
    if model.functions:
        model = inliner.inline_local_functions(model)
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)
    if opset < 11:
        try:
            return version_converter.convert_version(model, 11)
        except Exception as error:
            line = verify.first_line(error)
            raise ValueError(
                f"{source.name} has operator set {opset}, and onnx cannot convert it to 11 ({line}); export it anew"
            ) from error
    return model


def _start(model: Any) -> tuple[verify.Run, str]:
    """Run a model in ONNX Runtime, or in onnx's reference where that has no such operator."""
    content = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return verify.runner(content, "onnxruntime"), "onnxruntime"
    except ImportError:
        raise
    except Exception:
        evaluator: Any = ReferenceEvaluator(onnx.load_from_string(content))
        names = evaluator.input_names
        return lambda arrays: evaluator.run(None, dict(zip(names, arrays, strict=True))), "onnx reference"
