"""What the runs of the study say: one line for each run, means, intervals of differences, and the verdict.

docs/study.md states the rules, which were written before the runs.
"""

import csv
import dataclasses
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

__all__ = [
    "ARMS",
    "COMPARED",
    "LayerRow",
    "Run",
    "arm_of",
    "chosen",
    "decays",
    "reported",
    "summary",
    "to_csv",
    "verdict",
    "welch",
]

# Arm, as recipes name it, to its name in the protocol and what it is.
ARMS = {
    "A": ("A", "base"),
    "B": ("B", "Pool Skip, e = 2"),
    "Bzero": ("B′", "Pool Skip, zero-initialised"),
    "Bdepthwise": ("B″", "Pool Skip, depthwise"),
    "B4": ("B4", "Pool Skip, e = 4"),
    "C": ("C", "y = x + conv(x)"),
    "D": ("D", "one random position a window"),
    "F": ("F", "deeper base of equal cost"),
}
# Of the same net, shown at both weight decays, and in the picture over depth.
COMPARED = ("A", "B", "C")
_CHEAP = ("Bdepthwise", "B4")
_NAME = re.compile(r"(?P<net>[^.]+)\.study-(?P<arm>[A-Za-z0-9]+)")


@dataclass(frozen=True)
class Run:
    """A finished run; its fields are the columns of `runs.csv`.

    Attributes:
        net: base network.
        arm: key of `ARMS`.
        lr: peak learning rate.
        weight_decay: as in the recipe.
        seed: as in the recipe.
        recipe: name, with the seed that of the run's folder.
        epochs: epochs trained.
        parameters: of the model.
        macs: multiply-accumulates for one image.
        val_top1: accuracy on held-out training images, per cent.
        test_top1: accuracy on the test set, per cent; None where the run is not reported, or not yet.
        filters: of the base's convolutions.
        inert: of these.
        watched: channels of these before a ReLU.
        dead: of these.
        l2_l1: mean over the base's convolutions.
        skip_filters: of the 3×3 convolutions in Pool Skip's place; 0 without any.
        skip_inert: of these.
        skip_dead: of these, channels before a ReLU.
        hours: time of training.
        hardware: that trained it.
    """

    net: str
    arm: str
    lr: float
    weight_decay: float
    seed: int
    recipe: str
    epochs: int
    parameters: int
    macs: int
    val_top1: float
    test_top1: float | None
    filters: int
    inert: int
    watched: int
    dead: int
    l2_l1: float
    skip_filters: int
    skip_inert: int
    skip_dead: int
    hours: float
    hardware: str


@dataclass(frozen=True)
class LayerRow:
    """A convolution of a finished run; its fields are the columns of `layers.csv`.

    Attributes:
        net: as in `Run`, and so the next four.
        arm: key of `ARMS`.
        lr: peak learning rate.
        weight_decay: as in the recipe.
        seed: as in the recipe.
        layer: dotted name.
        kind: `base`, or `pool_skip` for what stands in Pool Skip's place.
        depth: place in the model's order.
        filters: number of filters.
        inert: of these.
        dead: of these; None where no ReLU follows.
        l2_l1: of its weights.
    """

    net: str
    arm: str
    lr: float
    weight_decay: float
    seed: int
    layer: str
    kind: str
    depth: int
    filters: int
    inert: int
    dead: int | None
    l2_l1: float | None


def arm_of(name: str) -> tuple[str, str]:
    """Net and arm that a recipe is of.

    Args:
        name: its name, `<net>.study-<arm>` and anything after `_`.

    Returns:
        Net and arm.

    Raises:
        ValueError: if it is no recipe of the study.

    Example:
        >>> arm_of("resnet20_cifar.study-B4_lr0.1")
        ('resnet20_cifar', 'B4')
    """
    found = _NAME.match(name)
    if not found or found["arm"] not in ARMS:
        raise ValueError(f"recipe {name!r} is not of the study: <net>.study-<arm>, the arm one of {', '.join(ARMS)}")
    return found["net"], found["arm"]


def to_csv(rows: Sequence[Run] | Sequence[LayerRow], row_class: type[Run] | type[LayerRow]) -> str:
    """Write rows of one class as CSV with a heading, its fields the columns, floats in full."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([field.name for field in dataclasses.fields(row_class)])
    table.writerows(dataclasses.astuple(row) for row in rows)
    return text.getvalue()


def chosen(runs: Iterable[Run], net: str, arm: str, weight_decay: float | None = None) -> list[Run]:
    """Runs of an arm, by seed, at the setting of best held-out accuracy with the first seed; none without such an arm.

    `weight_decay`: choose among the runs of this one alone.
    """
    own = [run for run in runs if (run.net, run.arm) == (net, arm) and weight_decay in (None, run.weight_decay)]
    if not own:
        return []
    first = min(run.seed for run in own)
    best = max((run for run in own if run.seed == first), key=lambda run: run.val_top1)
    same = [run for run in own if (run.lr, run.weight_decay) == (best.lr, best.weight_decay)]
    return sorted(same, key=lambda run: run.seed)


def decays(runs: Iterable[Run], net: str) -> list[float]:
    """Weight decays, rising, at which a net's arms A, B and C all have several seeds."""
    runs = list(runs)
    tried = sorted({run.weight_decay for run in runs if run.net == net})
    return [decay for decay in tried if all(len(chosen(runs, net, arm, decay)) > 1 for arm in COMPARED)]


def reported(runs: Iterable[Run]) -> list[Run]:
    """Runs whose accuracy on the test set counts: of each arm at its setting, of A, B and C also at each weight decay.

    Those that only served the choice of a setting are left out.
    """
    runs = list(runs)
    nets = {run.net for run in runs}
    kept = {run.recipe for net in nets for arm in ARMS for run in chosen(runs, net, arm)}
    for net in nets:
        for arm in COMPARED:
            for decay in decays(runs, net):
                kept.update(run.recipe for run in chosen(runs, net, arm, decay))
    return [run for run in runs if run.recipe in kept]


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Difference of two means with its 95 % interval by Welch (1947): variances need not be equal.

    Args:
        a: at least two values.
        b: at least two values.

    Returns:
        mean(a) − mean(b), and the interval's ends.

    Raises:
        ValueError: if there are fewer values.
        ImportError: if scipy is missing; it names the extra to install.

    Example:
        >>> [round(value, 3) for value in welch([1.0, 2.0, 3.0], [1.0, 1.5, 2.0])]
        [0.5, -1.578, 2.578]
    """
    try:
        from scipy.stats import ttest_ind
    except ImportError as error:
        raise ImportError("intervals need scipy: pip install 'poolskip-zoo[train]'") from error
    if min(len(a), len(b)) < 2:
        raise ValueError(f"an interval needs two seeds at least, not {len(a)} and {len(b)}")
    difference = mean(a) - mean(b)
    if not stdev(a) + stdev(b):
        return difference, difference, difference
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of values that are nearly equal
        low, high = ttest_ind(a, b, equal_var=False).confidence_interval()
    return difference, float(low), float(high)


def _test(runs: Iterable[Run]) -> list[float]:
    return [run.test_top1 for run in runs if run.test_top1 is not None]


def _difference(a: list[Run], b: list[Run]) -> tuple[float, float, float] | None:
    tested = _test(a), _test(b)
    return welch(*tested) if min(map(len, tested)) > 1 else None


def _told(found: tuple[float, float, float] | None, digits: int = 2) -> str:
    if found is None:
        return "–"
    difference, low, high = (f"{value:+.{digits}f}" for value in found)
    return f"{difference} [{low}, {high}]"


def _spread(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "–"
    told = f"{mean(values):.{digits}f}"
    return f"{told} ± {stdev(values):.{digits}f}" if len(values) > 1 else told


def verdict(runs: Sequence[Run], net: str) -> list[str]:
    """Sentences on one net, by the rule of docs/study.md.

    Args:
        runs: all runs.
        net: base network, whose arms are tested.

    Returns:
        Whether Pool Skip helps, whether the mechanism is supported, and how the cheap forms do.
    """
    of = {arm: chosen(runs, net, arm) for arm in ARMS}
    rivals = {arm: _difference(of["B"], of[arm]) for arm in ("C", "F") if of[arm]}
    told = ", ".join(f"B − {arm} = {_told(found)}" for arm, found in rivals.items())
    if len(rivals) < 2:
        says = "no verdict on whether Pool Skip helps, which needs C and F"
    elif None in rivals.values():
        says = "no verdict on whether Pool Skip helps, which needs two seeds of each of B, C and F"
    else:
        helps = all(found is not None and found[1] > 0 for found in rivals.values())
        says = "Pool Skip helps" if helps else "it is not shown that Pool Skip helps"
    sentences = [f"{net}: {says} ({told or 'no arm to compare with'}; test accuracy in points, 95 %)."]
    counts = {decay: _fewer(runs, net, decay) for decay in decays(runs, net)}
    told = ", ".join(f"{decay:g}: B − C = {_told(found, 1)}" for decay, found in counts.items())
    # Where the seeds of each arm agree there is no interval: they may do so by chance.
    below = any(low < high < 0 for _, low, high in counts.values())
    supported = below and all(found[0] <= 0 for found in counts.values())
    says = "the mechanism is supported" if supported else "the mechanism is not supported"
    if not supported and any(low == high < 0 for _, low, high in counts.values()):
        says += ", since seeds that agree give no interval"
    of_both = [run for decay in counts for arm in ("B", "C") for run in chosen(runs, net, arm, decay)]
    if of_both and not any(run.inert for run in of_both):
        says += ", nor was it put to the test: neither B nor C has inert filters"
    if counts:
        sentences.append(f"{net}: {says} (inert base filters at weight decay {told}).")
    else:
        sentences.append(f"{net}: no verdict on the mechanism, which needs two seeds of A, B and C at a weight decay.")
    for arm in _CHEAP:
        found = _difference(of[arm], of["B"])
        if found is not None:
            does = "does worse than B" if found[2] < 0 else "cannot be told from B, or does better"
            sentences.append(f"{net}: {ARMS[arm][0]} {does} ({ARMS[arm][0]} − B = {_told(found)}).")
    return sentences


def _fewer(runs: Sequence[Run], net: str, decay: float) -> tuple[float, float, float]:
    b, c = ([run.inert for run in chosen(runs, net, arm, decay)] for arm in ("B", "C"))
    return welch(b, c)


def summary(runs: Sequence[Run], unfinished: dict[str, str], diverged: Sequence[tuple[str, int]] = ()) -> str:
    """Verdict and tables in Markdown, without a last line break.

    `unfinished`: net to how far it is, of nets whose runs are not all finished; they have no verdict yet. `diverged`:
    recipes and seeds of runs that have no result. Where one is of a setting that counts, or of an arm that has none,
    there is no verdict: the seeds that are left are a choice by outcome.
    """
    nets = list(dict.fromkeys(run.net for run in runs))
    known = {(run.net, run.arm) for run in runs}
    counted = {run.recipe for run in reported(runs)}
    lines = ["### Verdict", ""]
    for net in dict.fromkeys([*nets, *unfinished, *(arm_of(name)[0] for name, _ in diverged)]):
        lost = [(name, seed) for name, seed in diverged if arm_of(name)[0] == net]
        if net in unfinished:
            said = [f"{net}: {unfinished[net]}: no verdict yet."]
        elif any(name in counted or arm_of(name) not in known for name, _ in lost):
            said = [f"{net}: no verdict, since runs that would count have diverged."]
        else:
            said = verdict(runs, net)
        if lost:
            said.append(f"{net}: diverged, in no number: {', '.join(f'{name}-s{seed}' for name, seed in lost)}.")
        lines += [f"- {sentence}" for sentence in said]
    for net in nets:
        lines += ["", f"### {net}", "", *_arms_table(runs, net)]
        if decays(runs, net):
            lines += ["", "Arms A, B and C at equal weight decay:", "", *_decay_table(runs, net)]
    return "\n".join(lines)


def _table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (heading, ["---"] * len(heading), *rows)]


def _arms_table(runs: Sequence[Run], net: str) -> list[str]:
    heading = ["arm", "", "parameters", "MMACs", "lr", "weight decay", "seeds", "held-out, %", "test, %", "B − arm"]
    rows = []
    b = chosen(runs, net, "B")
    for arm, (name, what) in ARMS.items():
        own = chosen(runs, net, arm)
        if not own:
            continue
        run = own[0]
        scores = [_spread([each.val_top1 for each in own]), _spread(_test(own))]
        against = _told(_difference(b, own)) if arm != "B" else "–"
        cost = [f"{run.parameters:,}", f"{run.macs / 1e6:.1f}", f"{run.lr:g}", f"{run.weight_decay:g}"]
        rows.append([name, what, *cost, len(own), *scores, against, *_counts(own)])
    return _table([*heading, "inert", "dead", "inert of the added 3×3"], rows)


def _counts(own: list[Run]) -> list[str]:
    """Inert and dead filters of the base, and inert ones of what stands in Pool Skip's place."""
    run = own[0]
    skip = f"{_spread([each.skip_inert for each in own], 1)} of {run.skip_filters}" if run.skip_filters else "–"
    return [
        f"{_spread([each.inert for each in own], 1)} of {run.filters}",
        f"{_spread([each.dead for each in own], 1)} of {run.watched}",
        skip,
    ]


def _decay_table(runs: Sequence[Run], net: str) -> list[str]:
    rows = []
    for decay in decays(runs, net):
        for arm in COMPARED:
            own = chosen(runs, net, arm, decay)
            l2_l1 = _spread([run.l2_l1 for run in own], 4)
            rows.append([f"{decay:g}", arm, f"{own[0].lr:g}", len(own), _spread(_test(own)), *_counts(own), l2_l1])
    return _table(
        ["weight decay", "arm", "lr", "seeds", "test, %", "inert", "dead", "inert of the added 3×3", "mean l2/l1"], rows
    )
