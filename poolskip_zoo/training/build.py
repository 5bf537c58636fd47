"""The parts of a run, made from its recipe by timm and accelerate."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models import PretrainedCfg
from torch import nn

from ..contexts import evaluating
from ..data import DATASETS
from ..registry.catalogue import create_base
from ..registry.checkpoint import SUFFIX, retrained_cfg
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(recipe: Recipe, cpu: bool = False) -> "Accelerator":
    """Make accelerate's engine for this process.

    Args:
        recipe: the run.
        cpu: train on the CPU where there is a GPU.

    Returns:
        The engine; under `torchrun` with its process group joined.

    Raises:
        ImportError: if accelerate, matplotlib or tqdm is missing.
        ValueError: if the device cannot do the recipe's precision.
    """
    try:
        import matplotlib  # noqa: F401  # its curves come last, and must not fail then
        import tqdm  # noqa: F401
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import GradientAccumulationPlugin
    except ImportError as error:
        raise ImportError(f"training needs {error.name}: pip install 'poolskip-zoo[train]'") from error
    cpu = cpu or not torch.cuda.is_available()
    if cpu and recipe.precision == "fp16":
        raise ValueError("precision='fp16' needs a GPU: take bf16 or fp32 on a CPU")
    if cpu and recipe.sync_bn and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sync_bn=True needs a GPU: torch has no synchronised BatchNorm for CPUs")
    AcceleratorState._reset_state()  # one process may train several recipes, of different precision
    precision = "no" if recipe.precision == "fp32" else recipe.precision
    # The loop accumulates by the recipe; what the environment says would scale gradients a second time.
    once = GradientAccumulationPlugin(num_steps=1)
    return Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_plugin=once)


def is_known(model: str) -> bool:
    """Tell whether timm has a model; those of the study are registered when one is asked for that it has not.

    Args:
        model: name with or without tag.

    Returns:
        True for a model that `timm.create_model` makes.
    """
    import timm

    if not timm.is_model(model):
        from .. import study  # noqa: F401
    return timm.is_model(model)


def make_model(recipe: Recipe) -> nn.Module:
    """Make the recipe's model on the CPU, with fresh weights unless `model_args` ask for others.

    Raises ValueError if timm does not know the model or it does not take `model_args`.
    """
    if not is_known(recipe.model):
        import difflib

        import timm

        close = difflib.get_close_matches(recipe.model, timm.list_models(), 3)
        raise ValueError(f"unknown model {recipe.model!r}; similar: {', '.join(close) or 'none'}")
    return create_classifier(recipe.model, recipe.dataset, recipe.model_args, recipe.image_size)


def create_classifier(name: str, dataset: str, model_args: Mapping[str, Any], image_size: int = 0) -> nn.Module:
    """Make a model by a recipe's arguments, of which a base takes those of our classes too: one recipe is of both.

    On the CPU, configured for the data at `image_size` (0: its own); ValueError if it does not take `model_args`.
    """
    import timm

    make = create_base if timm.is_model(name.partition(".")[0] + SUFFIX) else timm.create_model
    try:
        model: Any = make(name, num_classes=DATASETS[dataset].num_classes, **model_args)
    # As timm refuses keywords and values.
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise ValueError(
            f"{name} does not take model_args={dict(model_args)}: {type(error).__name__} {error}"
        ) from error
    cfg = retrained_cfg(PretrainedCfg(**model.pretrained_cfg), dataset, image_size, model_args)
    model.pretrained_cfg = model.default_cfg = cfg.to_dict()
    return model


def check_output(recipe: Recipe, model: nn.Module, sizes: Iterable[Sequence[int]]) -> None:
    """Raise ValueError if a model does not give images of these sizes, or each pixel, the data set's classes."""
    for height, width in sizes:
        expected = [1, DATASETS[recipe.dataset].num_classes, *([height, width] if recipe.segments else [])]
        try:
            with evaluating(model), torch.no_grad():
                output = model(torch.zeros(1, 3, height, width))
            shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            said = "" if shape == expected else f"gives {shape}, not {expected}, for one image"
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            said = f"does not take images ({' '.join(str(error).split())})"
        if said:
            way_out = f": set model_args.img_size={height}, or model_args.dynamic_img_size=true for several sizes"
            raise ValueError(
                f"{recipe.model} with model_args={recipe.model_args} {said} of {height}×{width} pixels"
                + (way_out if hasattr(model, "patch_embed") else "")
            )


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer, without weight decay on biases and norms unless `optimizer_args` ask for it.

    Args:
        recipe: the run.
        model: the model, on its device.

    Returns:
        The optimizer.

    Raises:
        ValueError: if timm does not know the optimizer or it does not take `optimizer_args`.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay

    # timm's "sgd" is Nesterov's, its "momentum" the plain one
    name = "momentum" if recipe.optimizer == "sgd" and not recipe.nesterov else recipe.optimizer
    names = map(str, list_optimizers())
    known = [option for option in names if not get_optimizer_info(option).second_order]  # of a second backward
    if name not in known:
        raise ValueError(f"unknown optimizer {name!r}: one of {', '.join(known)}")
    settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "momentum": recipe.momentum}
    parameters: Any = model
    if recipe.segments:  # smp's models do not say what their encoders exempt
        exempt = [
            f"{prefix}.{name}"
            for prefix, module in model.named_modules()
            if prefix and hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        ]
        parameters = [{"params": list(model.parameters())}]
        if recipe.optimizer_args.get("filter_bias_and_bn", True):
            parameters = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=exempt)
    if recipe.encoder_lr != 1:
        encoder = set(model.get_submodule("encoder").parameters())
        parameters = [
            {**group, "params": chosen, "lr_scale": scale}  # lr_scale: timm's schedulers multiply by it
            for group in parameters
            for scale, inside in ((1.0, False), (recipe.encoder_lr, True))
            if (chosen := [parameter for parameter in group["params"] if (parameter in encoder) == inside])
        ]
    try:
        return create_optimizer_v2(parameters, opt=name, **{**settings, **recipe.optimizer_args})
    # AssertionError, ImportError: what needs a GPU or a package
    except (TypeError, ValueError, IndexError, AssertionError, ImportError) as error:
        raise ValueError(f"no optimizer {name} with optimizer_args={recipe.optimizer_args}: {error}") from error


def make_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """Make timm's scheduler, a pure function of the number of updates: call `step_update(updates)` before each."""
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler

    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    settings: dict[str, Any] = {
        "t_initial": max(1, recipe.epochs * steps_per_epoch - warmup),
        "lr_min": recipe.min_lr,
        "warmup_t": warmup,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if recipe.scheduler == "cosine":
        return CosineLRScheduler(optimizer, **settings)
    return PolyLRScheduler(optimizer, power={"linear": 1.0, "poly": 0.9, "constant": 0.0}[recipe.scheduler], **settings)


def make_mixup(recipe: Recipe) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """Make timm's mixup and CutMix: images and labels to mixed images and soft labels; None if there is neither."""
    from timm.data import Mixup

    if not recipe.mixes:
        return None
    return Mixup(
        recipe.mixup,
        recipe.cutmix,
        prob=recipe.mix_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=DATASETS[recipe.dataset].num_classes,
    )
