"""Models, images and comparisons that the checks share."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from poolskip_zoo import remove_pool_skip
from poolskip_zoo.registry.catalogue import base_name

Check = Callable[[str], bool | None]
CHECKS: dict[str, Check] = {}


def contract(check: Check) -> Check:
    CHECKS[check.__name__.removeprefix("check_")] = check
    return check


class Function(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def side(name: str) -> int:
    """Side of the images to test with: small, but what the model insists on."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[-1] if cfg.fixed_input_size else 64


def images(name: str, batch: int = 2, channels: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *(size or (side(name),) * 2), generator=generator)


def enliven(model: nn.Module) -> nn.Module:
    """Undo initialisations that hide residual branches (gains of zero, layer scales of 1e-6)."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.rpartition(".")[2] in ("weight", "gamma"):
                parameter.uniform_(0.5, 1.5)
    return model


def create(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return enliven(timm.create_model(name, **kwargs))


def create_base(name: str, **kwargs: Any) -> nn.Module:
    base = base_name(name)
    return create(base, **kwargs) if timm.is_model(base) else enliven(remove_pool_skip(create(name, **kwargs)))


def load_base(variant: nn.Module, base: nn.Module) -> nn.Module:
    result = variant.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all(".pool_skip.conv." in key for key in result.missing_keys)
    return variant


def pair(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The base, and the variant with the same weights and Pool Skip at zero: both compute the same."""
    base = create_base(name, **kwargs)
    return base, load_base(create(name, pool_skip={"zero_init": True}, **kwargs), base)


def flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def assert_same(got: Any, expected: Any) -> None:
    """Equal to the bit, in every tensor of nested lists."""
    got, expected = flat(got), flat(expected)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs


def alike(name: str, use: Callable[[nn.Module], Any], **kwargs: Any) -> bool:
    """Whether base and variant do the same with a model of these keywords: equal to the bit, or refused alike."""
    outcomes = []
    for make in (lambda: create_base(name, **kwargs), lambda: pair(name, **kwargs)[1]):
        try:
            model = make()
            torch.manual_seed(3)
            outcomes.append(use(model))
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            outcomes.append(error)
    base, variant = outcomes
    if isinstance(base, Exception):
        assert type(variant) is type(base), f"the base refuses with {base!r}, the variant gives {variant!r}"
        return False
    if isinstance(variant, Exception):
        raise variant
    assert_same(variant, base)
    return True


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(4)
    model(x).square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    return [parameter.grad.clone() for parameter in model.parameters()]
