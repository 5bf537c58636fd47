"""The graph pass: max-unpooling without index tensors, for any model that torch.export captures."""

import copy
import inspect
import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode

from ..layers import functional
from . import forms
from .inputs import as_args
from .lower_pair import POOLS, UNPOOLS, Block, Pair, drop_unused_indices, from_pool, root, source, spread, unpoolings
from .targets import check_drop_in, check_mode, check_target

__all__ = ["blocks_of", "capture", "lower_program", "lower_unpooling", "returning_maps"]

_logger = logging.getLogger(__name__)


def lower_unpooling(
    model: nn.Module | ExportedProgram,
    example: Tensor | tuple[Any, ...] | None = None,
    target: str = "onnxruntime",
    lowering: str | None = None,
    dynamic_shapes: Any = "auto",
) -> GraphModule:
    """Replace the index tensors of every max pooling and unpooling by a form that runtimes run well.

    Finds each `max_pool*d(return_indices=True)` with its `max_unpool*d`, functional or module, in one to three
    dimensions, with the pooled values or others. For finite values the result equals the original (zeros may have
    another sign). Pairs that the form does not fit (overlapping windows, padding, dilation, windows of more than 256
    cells, an output of another size than the pooled map) keep an index tensor and a scatter; a warning says so.

    Args:
        model: a module in evaluation mode, or a program of `torch.export.export`.
        example: the module's positional arguments, a tensor or a tuple; not needed for a program. A size of 1 stays
            fixed.
        target: runtime to lower for, one of `TARGETS`.
        lowering: `keys`, `scatter` or `arith` in place of the target's own; `native` stays torch's own pair here,
            which `to_onnx` writes as MaxUnpool.
        dynamic_shapes: as for `torch.export.export`; "auto" leaves batch and spatial sizes open where the model
            allows it, None fixes all.

    Returns:
        A module that runs in eager mode and exports again; `blocks_of` gives what was done.

    Raises:
        ValueError: if an option is unknown, the module trains, or an unpooling cannot be lowered; the message names
            the node, the line of the model's code, and the way out.

    Example:
        >>> import torch
        >>> from poolskip_zoo.export import blocks_of, lower_unpooling
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         y, i = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
        ...         return torch.nn.functional.max_unpool2d(y + 1, i, 2, output_size=x.shape[2:])
        >>> lowered = lower_unpooling(Net().eval(), torch.randn(2, 3, 9, 7))
        >>> x = torch.randn(1, 3, 6, 11)
        >>> torch.equal(lowered(x), Net()(x)), [block.lowering for block in blocks_of(lowered)]
        (True, ['keys'])
    """
    check_target(target, lowering)
    if not isinstance(model, ExportedProgram):
        if example is None:
            raise ValueError("example=None: a module is captured with example arguments; pass a tensor or a tuple")
        check_drop_in(model, target, lowering)
        model = capture(model, as_args(example), dynamic_shapes)
    else:
        model = _functional(model)
    return lower_program(model, target, lowering, {"keys": forms.keys, "arith": forms.arith, "scatter": forms.scatter})


def blocks_of(lowered: GraphModule) -> tuple[Block, ...]:
    """What `lower_unpooling` did.

    Args:
        lowered: its result.

    Returns:
        One record per unpooling, in the graph's order.
    """
    return lowered.meta["unpooling"]


def capture(model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = "auto") -> ExportedProgram:
    """`torch.export` of a model, with Pool Skip as torch's pair of pooling and unpooling.

    `dynamic_shapes` as for `lower_unpooling`. Raises ValueError if the module trains, or its sizes depend on values.
    """
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    check_mode(model)
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != "auto":
            raise ValueError(f"dynamic_shapes={dynamic_shapes!r}: expected 'auto', None or what torch.export takes")
        dynamic_shapes = tuple(_open_sizes(value) for value in args)
    kinds = [each.kind for each in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds and isinstance(dynamic_shapes, tuple):
        first = kinds.index(inspect.Parameter.VAR_POSITIONAL)  # torch.export takes what *args holds as one argument
        dynamic_shapes = (*dynamic_shapes[:first], dynamic_shapes[first:])
    mode = torch.get_deterministic_debug_mode()
    # torch's unpooling refuses deterministic mode even where it is only recorded.
    torch.set_deterministic_debug_mode("default")
    try:
        with functional.capture_stock(), _RowsForSequences(), torch.no_grad():
            return _functional(torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False))
    except (GuardOnDataDependentSymNode, UserError) as error:
        if "data-dependent" not in str(error) and not isinstance(error, GuardOnDataDependentSymNode):
            raise
        raise ValueError(
            f"a size or a branch depends on values, which no graph can hold ({str(error).strip().splitlines()[0]}); "
            "compute sizes from shapes, for example output_size=x.shape[-2:], and choose values by torch.where"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)


class _RowsForSequences(TorchFunctionMode):
    """Pools a sequence as an image of one row: torch.export freezes the length in max_pool1d."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (F.max_pool1d, torch.max_pool1d):
            return func(*args, **(kwargs or {}))
        return _pool_row(*args, **(kwargs or {}))


def _pool_row(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    window, steps, pad, gaps = (spread(each, 1) for each in (kernel_size, stride, padding, dilation))
    rows = ([1, *window], [1, *(steps or window)], [0, *pad], [1, *gaps])
    return F.max_pool2d(input.unsqueeze(-2), *rows, ceil_mode=ceil_mode).squeeze(-2)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Without operators in place, if one comes between a pooling and its unpooling, or equal unpoolings are merged.

    Forms stand where the unpooling is and read the map that was pooled, which may be overwritten by then; and of two
    equal results one may be overwritten. Elsewhere they stay: to trace a ResNet anew takes longer than to capture it.
    """
    nodes = list(program.graph.nodes)
    indices = {place: root(node.args[1]) for place, node in enumerate(nodes) if node.target in UNPOOLS}
    spans = [nodes[nodes.index(made.args[0]) : place] for place, made in indices.items() if from_pool(made)]
    if any(unpoolings(program.graph).values()):
        spans = [nodes]
    schemas = [getattr(node.target, "_schema", None) for span in spans for node in span]
    if any(schema and schema.is_mutable for schema in schemas):
        return program.run_decompositions({})
    return program


def _open_sizes(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor) or value.dim() < 3:
        return None
    return dict.fromkeys((0, *range(2, value.dim())), Dim.AUTO)


def lower_program(
    program: ExportedProgram, target: str, lowering: str | None, written: dict[str, Callable[..., Tensor]]
) -> GraphModule:
    """The pass itself, on a captured program; see `lower_unpooling`.

    `written` has what to call for each lowering, with the arguments of its function in `forms`; one that is missing
    keeps torch's pair.
    """
    module = program.module()
    assert isinstance(module, GraphModule)
    if lowering != "scatter":
        _check_subgraphs(module)
    graph, choice, blocks = module.graph, check_target(target, lowering), []
    for unpooling, equal in unpoolings(graph).items():
        # Exporters merge equal nodes, and each unpooling is looked for in what they write.
        for each in equal:
            each.replace_all_uses_with(unpooling)
            graph.erase_node(each)
        pair = Pair(unpooling)
        wanted = lowering if pair.pooling is None else choice.choose(pair.pooling.window, lowering)
        reason = None if wanted == "scatter" else pair.misfit()
        used = "scatter" if reason else wanted
        if reason:
            _logger.warning("%s: scatter in place of %s: %s", pair.place, wanted, reason)
        assert used is not None
        blocks.append(pair.block(used, reason))
        if used in written:
            pair.write(graph, written[used], used)
    graph.eliminate_dead_code()
    for pooling in [node for node in graph.nodes if node.target in POOLS]:
        drop_unused_indices(graph, pooling)
    graph.eliminate_dead_code()
    module.recompile()
    module.meta["unpooling"] = tuple(blocks)
    return module


def returning_maps(
    module: GraphModule, masked: Collection[Any], blocks: list[dict[str, Any]]
) -> tuple[GraphModule, list[int]]:
    """Copy of a lowered module that returns the maps that its unpoolings by a mask (calls of `masked`) read.

    With it come their places among the blocks; a map that is an input of the model, the same everywhere, is left out.
    """
    module = copy.deepcopy(module)
    places = [place for place, block in enumerate(blocks) if block["lowering"] != "scatter"]
    maps = [node.args[1] for node in module.graph.nodes if node.target in masked]
    chosen = [(node, place) for node, place in zip(maps, places, strict=True) if node.op != "placeholder"]
    for output in module.graph.find_nodes(op="output"):
        output.args = (tuple(node for node, _ in chosen),)
    module.graph.eliminate_dead_code()
    # A captured module rebuilds its outputs by the original's structure.
    module.graph.set_codegen(CodeGen())
    module.recompile()
    return module, [place for _, place in chosen]


def _check_subgraphs(module: GraphModule) -> None:
    """Refuse unpoolings in the branches of torch.cond and the like."""
    for name, part in module.named_modules():
        for unpooling in unpoolings(part.graph) if name and isinstance(part, GraphModule) else ():
            raise ValueError(
                f"node {unpooling.name!r} ({source(unpooling)}) lies inside torch.cond or the like, where unpoolings "
                "are not lowered: compute both branches and choose by torch.where; lowering='scatter' leaves it as is"
            )
