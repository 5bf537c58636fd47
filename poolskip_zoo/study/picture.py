"""The two pictures of the study: accuracy against cost, and inert filters and l2/l1 over depth."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..pictures import new_figure, save_figure
from .results import ARMS, COMPARED, LayerRow, Run, chosen, decays

__all__ = ["draw_cost", "draw_depth"]

# Over depth, where arms lie on each other and two colours are alike to many eyes.
_LINES = dict(zip(COMPARED, ("o-", "^-", "s--"), strict=True))


def draw_cost(path: Path, runs: Sequence[Run]) -> None:
    """Draw accuracy of each arm, by rising cost: each seed a dot, each arm's mean and standard deviation.

    Args:
        path: the PNG.
        runs: all runs; nets without test accuracies are drawn by held-out ones, and say so.

    Raises:
        ImportError: if matplotlib is missing; it names the extra to install.
    """
    nets = list(dict.fromkeys(run.net for run in runs))
    figure = new_figure(6 * len(nets), 5)
    named: dict[str, Any] = {}
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        arms = {arm: own for arm in ARMS if (own := chosen(runs, net, arm))}
        tested = all(run.test_top1 is not None for own in arms.values() for run in own)
        order = sorted(arms, key=lambda arm: arms[arm][0].macs)
        for x, arm in enumerate(order):
            scores = [(run.test_top1 or 0.0) if tested else run.val_top1 for run in arms[arm]]
            colour, error = _colour(arm), stdev(scores) if len(scores) > 1 else 0
            axes.plot([x + 0.15] * len(scores), scores, ".", color=colour, alpha=0.5)
            bar = axes.errorbar(x, mean(scores), error, marker="o", capsize=4, color=colour)
            named[", ".join(ARMS[arm])] = bar
        axes.set_xticks(range(len(order)), [f"{ARMS[arm][0]}\n{arms[arm][0].macs / 1e6:.1f}" for arm in order])
        axes.set(
            title=net,
            xlabel="arm, and its million multiply-accumulates",
            ylabel=f"{'test' if tested else 'held-out'} accuracy, % (dots: seeds, bars: standard deviation)",
        )
        axes.margins(0.1)
        axes.grid(alpha=0.3)
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=2 * len(nets), fontsize="small")
    save_figure(figure, path)


def draw_depth(path: Path, runs: Sequence[Run], layers: Sequence[LayerRow]) -> None:
    """Draw inert filters and l2/l1 over depth, of arms A, B and C: a column for each net and weight decay.

    Args:
        path: the PNG.
        runs: all runs.
        layers: their convolutions.

    Raises:
        ImportError: if matplotlib is missing; it names the extra to install.
        ValueError: if no weight decay has several seeds of A, B and C.
    """
    measures: list[tuple[str, str, Callable[[LayerRow], float | None]]] = [
        ("base", "inert filters, share", lambda layer: layer.inert / layer.filters),
        ("pool_skip", "inert in the added 3×3, share", lambda layer: layer.inert / layer.filters),
        ("base", "l2/l1 of the weights", lambda layer: layer.l2_l1),
        ("pool_skip", "l2/l1 of the added 3×3", lambda layer: layer.l2_l1),
    ]
    # Rows of nothing but zeros are left out.
    measures = [each for each in measures if any(each[2](layer) for layer in layers if layer.kind == each[0])]
    columns = [(net, decay) for net in dict.fromkeys(run.net for run in runs) for decay in decays(runs, net)]
    if not columns:
        raise ValueError("no weight decay has several seeds of each of A, B and C: there is nothing to draw over depth")
    figure = new_figure(4.2 * len(columns), 0.6 + 2.6 * len(measures))
    grid = figure.subplots(len(measures), len(columns), squeeze=False, sharey="row", sharex=True)
    for row, (kind, label, value) in zip(grid, measures, strict=True):
        for axes, (net, decay) in zip(row, columns, strict=True):
            for arm in COMPARED:
                own = {(run.lr, run.weight_decay, run.seed) for run in chosen(runs, net, arm, decay)}
                of_arm = [
                    layer
                    for layer in layers
                    if (layer.net, layer.arm, layer.kind) == (net, arm, kind)
                    and (layer.lr, layer.weight_decay, layer.seed) in own
                ]
                _plot(axes, of_arm, value, arm)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(label)
        row[0].set_ylim(0, None if row[0].get_ylim()[1] > 0.06 else 0.06)
    for axes, (net, decay) in zip(grid[0], columns, strict=True):
        axes.set_title(f"{net}, weight decay {decay:g}", fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("depth in convolutions; means over seeds")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=min(5, 2 * len(columns)))
    save_figure(figure, path)


def _plot(axes: Any, layers: list[LayerRow], value: Callable[..., float | None], arm: str) -> None:
    """Plot the mean over seeds at each depth."""
    by_depth: dict[int, list[float]] = {}
    for layer in layers:
        number = value(layer)
        if number is not None:
            by_depth.setdefault(layer.depth, []).append(number)
    if by_depth:
        depths = sorted(by_depth)
        means = [mean(by_depth[depth]) for depth in depths]
        axes.plot(depths, means, _LINES[arm], markersize=4, color=_colour(arm), alpha=0.8, label=", ".join(ARMS[arm]))


def _colour(arm: str) -> str:
    return f"C{list(ARMS).index(arm)}"
