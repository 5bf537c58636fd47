"""Where Pool Skip goes, as plain data: presets of model families, name patterns, predicates, and `auto`."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from .pool_skip import PoolSkip

__all__ = [
    "Groups",
    "Placement",
    "PlacementLike",
    "PoolSize",
    "Rule",
    "norm_after",
    "refuses",
    "register_placements",
    "resolve_placement",
]

# A number, the convolution's own ("auto"), or one per channel ("depthwise").
Groups = int | Literal["auto", "depthwise"]
PoolSize = int | tuple[int, ...]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = re.compile(r"[Nn]orm|BN|Bn|^bn")
# A shortcut carries the signal past the convolutions; Pool Skip there would change what the block adds to.
_SHORTCUTS = ("downsample", "shortcut", "skip", "project")
# Classes whose 1×1 convolutions work on pooled 1×1 maps: squeeze-excite gates and channel attention.
_GATES = ("squeeze", "semodule", "sewithnorm", "attn", "attention", "gate")


@dataclass(frozen=True)
class Rule:
    """One kind of place.

    Attributes:
        names: glob over dotted module names (`*` also crosses dots).
        parent: class name of the module that holds it, or "" for any.
        exclude: glob of names to leave out, or "".
        pool_size: window size e.
        groups: groups of the 3×3 convolution.
    """

    names: str
    parent: str = ""
    exclude: str = ""
    pool_size: PoolSize = 2
    groups: Groups = 1

    def matches(self, name: str, parent: nn.Module) -> bool:
        """Whether the module called `name` inside `parent` is such a place.

        Args:
            name: dotted name in the model.
            parent: the module that holds it.

        Returns:
            True if names, parent class and exclusion all agree.
        """
        of_parent = not self.parent or any(cls.__name__ == self.parent for cls in type(parent).__mro__)
        return of_parent and fnmatchcase(name, self.names) and not fnmatchcase(name, self.exclude)


Placement = Sequence[Rule]
Predicate = Callable[[str, nn.Module], bool]
PlacementLike = str | Rule | Iterable[str | Rule] | Predicate | None

_PRESETS: dict[type[nn.Module], Mapping[str, Placement]] = {}


def register_placements(model_class: type[nn.Module], presets: Mapping[str, Placement]) -> None:
    """Give a model class and its subclasses named placements.

    Args:
        model_class: any module class.
        presets: name to rules; "default" is used when no placement is named.
    """
    _PRESETS[model_class] = presets


def presets_of(model: nn.Module) -> Mapping[str, Placement]:
    """Named placements of a model's family, name to rules; none for a model of no known family."""
    return next((_PRESETS[cls] for cls in type(model).__mro__ if cls in _PRESETS), {})


def resolve_placement(model: nn.Module, placement: PlacementLike) -> dict[str, Rule]:
    """Find the modules that a placement names.

    Args:
        model: any module.
        placement: None (the family's "default", else "auto"), a preset's name, "auto", one or several globs over
            module names, rules, or a predicate of name and module.

    Returns:
        Module name to the rule that chose it, in the model's order; the first matching rule wins.

    Raises:
        ValueError: if the name is no preset of the model and no pattern, or if nothing matches; the message lists
            the options.
    """
    presets = presets_of(model)
    if placement is None:
        placement = "default" if "default" in presets else "auto"
    if isinstance(placement, str):
        if placement == "auto":
            return _require(model, {name: Rule(name, groups="auto") for name in _auto_names(model)}, "auto")
        if placement in presets:
            return _require(model, _by_rules(model, presets[placement]), placement)
        if not any(c in placement for c in "*?[.") and placement not in dict(model.named_modules()):
            raise ValueError(
                f"unknown placement {placement!r}: choose {', '.join(map(repr, [*presets, 'auto']))}, "
                f"name patterns such as 'layer1.*.conv1', or a predicate"
            )
        placement = [placement]
    if callable(placement):
        chosen = {name: Rule(name, groups="auto") for name, module in model.named_modules() if placement(name, module)}
        return _require(model, chosen, "predicate")
    given: list[str | Rule] = [placement] if isinstance(placement, Rule) else list(placement)
    rules = tuple(rule if isinstance(rule, Rule) else Rule(rule, groups="auto") for rule in given)
    chosen = _require(model, _by_rules(model, rules), [rule.names for rule in rules])
    for pattern in given:
        # A rule of a preset may fit another depth of the family; a pattern that somebody wrote must fit this model.
        if isinstance(pattern, str):
            _require(model, {name: rule for name, rule in chosen.items() if fnmatchcase(name, pattern)}, pattern)
    return chosen


def _by_rules(model: nn.Module, rules: Placement) -> dict[str, Rule]:
    chosen = {}
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and name:
            parent = model.get_submodule(name.rpartition(".")[0])
            rule = next((rule for rule in rules if rule.matches(name, parent)), None)
            if rule is not None:
                chosen[name] = rule
    return chosen


def _auto_names(model: nn.Module) -> list[str]:
    """Convolutions directly followed by a norm among their parent's children, with the exceptions of `auto`.

    Not the first, no shortcut and no gate; and no 1×1 convolution that widens, where a dense 3×3 on the wide side costs
    most: it would add 82 million parameters to the 5.3 of efficientnet_b0.
    """
    convolutions = [name for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    names = []
    for name in convolutions[1:]:
        convolution, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        shortcut = any(word in name.split(".") for word in _SHORTCUTS)
        excepted = shortcut or _is_gate(convolution, parent) or _widens(convolution)
        if norm_after(model, name) and not excepted and not _reparameterised(model, name):
            names.append(name)
    return names


def _widens(convolution: Any) -> bool:
    return set(convolution.kernel_size) == {1} and convolution.out_channels > convolution.in_channels


def _is_gate(convolution: Any, parent: nn.Module) -> bool:
    name = type(parent).__name__.lower()
    return set(convolution.kernel_size) == {1} and any(word in name for word in _GATES)


def norm_after(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """The norm that directly follows a module: its next sibling, or the first inside what only holds a norm.

    Dotted name and module, or None.
    """
    parent, _, child = name.rpartition(".")
    siblings = dict(model.get_submodule(parent).named_children())
    following = list(siblings)[list(siblings).index(child) + 1 :] if child in siblings else []
    if not following:
        return None
    path, module = f"{parent}.{following[0]}".lstrip("."), siblings[following[0]]
    # A norm may have children (timm's BatchNormAct2d holds its activation); what only holds a norm has no state.
    while not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        inner = next(module.named_children(), None)
        if inner is None:
            break
        path, module = f"{path}.{inner[0]}", inner[1]
    return (path, module) if _NORM.search(type(module).__name__) else None


def _reparameterised(model: nn.Module, name: str) -> str:
    """Class name of the outermost module around `name` that can merge its convolutions, or ""."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        # The class, not the object: a child module may be called "fuse".
        ancestor = type(model.get_submodule(".".join(parts[:end])))
        if any(callable(getattr(ancestor, method, None)) for method in ("fuse", "reparameterize")):
            return ancestor.__name__
    return ""


def refuses(model: nn.Module, name: str) -> str:
    """Why Pool Skip cannot follow a module, or "" if it can.

    Args:
        model: the whole model.
        name: dotted name of the module.

    Returns:
        A phrase that completes "module X ...".
    """
    module = model.get_submodule(name)
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return f"is a {type(module).__name__}: only Conv1d/2d/3d and Linear (on a patch grid) can have Pool Skip"
    if is_lazy(module.weight):
        return "is lazy and has no channels yet: run the model once first"
    if not module.weight.is_floating_point():
        return f"has weights of {module.weight.dtype}: only those of floating-point ones can have Pool Skip"
    if hasattr(module, "pool_skip"):
        return "has Pool Skip already: remove_pool_skip(model) first"
    merging = _reparameterised(model, name)
    if merging:
        return f"lies in {merging}, whose re-parameterisation would drop its Pool Skip"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), PoolSkip):
        return "belongs to a Pool Skip: exclude it, or remove_pool_skip(model) first"
    return ""


def _require(model: nn.Module, chosen: dict[str, Rule], placement: object) -> dict[str, Rule]:
    if chosen:
        return chosen
    candidates = [name for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    shown = ", ".join(candidates[:12]) + (f", … ({len(candidates)} in all)" if len(candidates) > 12 else "")
    if shown and placement == "auto":
        shown += "; it takes only those that a norm directly follows, and not all of them: give name patterns"
    raise ValueError(
        f"placement {placement!r} matches nothing in {type(model).__name__}: its convolutions are {shown or 'none'}"
    )
