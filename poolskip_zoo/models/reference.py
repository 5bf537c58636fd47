"""State dicts of the reference code (github.com/sunck1/PoolSkip, `models/resnet_poolskip.py`) in timm's names.

Its ResNet-18 and 34 are `resnet18_cifar_poolskip` and `resnet34_cifar_poolskip`, which compute the same function. Its
deeper networks cannot be built: their bottleneck passes a keyword that its own Pool Skip module does not take.
"""

import re
from collections.abc import Mapping

from torch import Tensor

__all__ = ["convert_reference_state_dict"]

_STAGES = {"conv2_x": "layer1", "conv3_x": "layer2", "conv4_x": "layer3", "conv5_x": "layer4"}
_STEM = {"0": "conv1", "1": "bn1"}
# Place in the block's residual sequence: convolution, Pool Skip, norm, activation, and the same again.
_RESIDUAL = {
    "0": "conv1",
    "1.conv": "conv1.pool_skip.conv",
    "2": "bn1",
    "4": "conv2",
    "5.conv": "conv2.pool_skip.conv",
    "6": "bn2",
}
_SHORTCUT = {"0": "downsample.0", "1": "downsample.1"}
_PARAMETER = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_STEM_KEY = re.compile(rf"conv1\.([01])\.{_PARAMETER}")
_BLOCK_KEY = re.compile(rf"(conv[2-5]_x)\.(\d+)\.(residual_function|shortcut)\.(\d(?:\.conv)?)\.{_PARAMETER}")


def convert_reference_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a reference state dict to the names of `resnet18_cifar_poolskip` or `resnet34_cifar_poolskip`.

    Load it with `strict=True` into `timm.create_model(name, num_classes=100)`; the reference code's default is 100
    classes.

    Args:
        state_dict: of the reference code's `resnet18()` or `resnet34()`, with or without the `module.` that
            DataParallel puts before each name.

    Returns:
        A new dict with the same tensors.

    Raises:
        ValueError: if a name is none of theirs, or belongs to one of the deeper, bottleneck networks.

    Example:
        >>> import torch
        >>> list(convert_reference_state_dict({"conv3_x.0.residual_function.1.conv.bias": torch.zeros(128)}))
        ['layer2.0.conv1.pool_skip.conv.bias']
    """
    plain = {key.removeprefix("module."): value for key, value in state_dict.items()}
    # A bottleneck's residual sequence has three convolutions: ten or eleven entries instead of seven.
    deep = next((key for key in plain if re.search(r"\.residual_function\.(8|9|10)\.", key)), None)
    if deep is not None:
        raise ValueError(
            f"{deep!r} belongs to a bottleneck network (ResNet-50 or deeper), which the reference code cannot build: "
            f"only its resnet18 and resnet34 can be converted"
        )
    return {_convert(key): value for key, value in plain.items()}


def _convert(key: str) -> str:
    if key in ("fc.weight", "fc.bias"):
        return key
    if match := _STEM_KEY.fullmatch(key):
        return f"{_STEM[match[1]]}.{match[2]}"
    if match := _BLOCK_KEY.fullmatch(key):
        stage, block, branch, place, parameter = match.groups()
        name = (_SHORTCUT if branch == "shortcut" else _RESIDUAL).get(place)
        if name:
            return f"{_STAGES[stage]}.{block}.{name}.{parameter}"
    raise ValueError(
        f"{key!r} is not a name of the reference code's resnet18 or resnet34 (conv1.*, conv2_x.* to conv5_x.*, fc.*)"
    )
