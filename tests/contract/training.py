"""Initialisation, parameter groups, determinism, checkpoints, averages."""

import contextlib
import itertools
import re
import tempfile
from collections.abc import Iterator

import timm
import torch
from timm.models import clean_state_dict, group_parameters, load_checkpoint
from timm.models import resume_checkpoint as timm_resume_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor

from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.models.mixin import PoolSkipModel

from .common import assert_same, contract, create, gradients, images


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contract
def check_initialisation(name: str) -> None:
    """PyTorch's own for Pool Skip, also after the base's initialisation runs again."""
    for zero in (False, True):
        model = timm.create_model(name, pool_skip={"zero_init": zero})
        # VGG names its own otherwise, and some bases have none.
        methods = ("init_weights", "_initialize_weights")
        again = model.init_weights if any(hasattr(super(PoolSkipModel, model), m) for m in methods) else lambda: None
        for step in (lambda: None, again):
            step()
            for layer in pool_skip_modules(model).values():
                weight = layer.conv.weight
                # kaiming_uniform_(a=√5) is uniform within 1 / √fan_in.
                bound = 0.0 if zero else (weight.shape[1] * weight[0, 0].numel()) ** -0.5
                assert weight.abs().max() <= bound
                assert weight.std() >= 0.5 * bound / 3**0.5


@contract
def check_parameter_groups(name: str) -> None:
    """timm's layer-wise groups hold every parameter, Pool Skip's beside its convolution's."""
    model = create(name)
    names = [n for n, _ in model.named_parameters()]
    for coarse, reverse in itertools.product((False, True), (False, True)):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=reverse)
        if reverse:
            assert sorted(groups) == sorted(names)
            for key in names:
                if ".pool_skip." in key:
                    assert groups[key] == groups[re.sub(r"\.pool_skip\.conv\.\w+$", ".weight", key)]
        else:
            assert sorted(itertools.chain(*groups.values())) == sorted(names)


@contract
def check_weight_decay(name: str) -> None:
    model = create(name)
    for groups in (
        create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1).param_groups,
        create_optimizer_v2(model, opt="sgd", lr=1e-3, weight_decay=0.1, layer_decay=0.7).param_groups,
        param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.7),
    ):
        decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        assert len(decay) == sum(len(group["params"]) for group in groups) == sum(1 for _ in model.parameters())
        for layer in pool_skip_modules(model).values():
            assert decay[id(layer.conv.weight)] == 0.1
            assert decay[id(layer.conv.bias)] == 0.0


@contract
def check_deterministic_training(name: str) -> None:
    def train() -> list[Tensor]:
        model = create(name).train()
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
        for _ in range(2):
            gradients(model, images(name))
            optimizer.step()
        return list(model.state_dict().values())

    start = create(name).state_dict().values()
    with deterministic_algorithms():
        first, second = train(), train()
    assert_same(first, second)
    assert not all(torch.equal(a, b) for a, b in zip(first, start, strict=True))


@contract
def check_training_checkpoints(name: str) -> None:
    """timm's saver, resume and load helpers; keys as DistributedDataParallel and torch.compile prefix them."""
    model = create(name)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.01)
    gradients(model, images(name))
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(model, optimizer, checkpoint_dir=folder, recovery_dir=folder)
        saver.save_checkpoint(epoch=3, metric=1.0)
        file = f"{folder}/last.pth.tar"
        loaded = timm.create_model(name)
        load_checkpoint(loaded, file)
        resumed = timm.create_model(name)
        assert timm_resume_checkpoint(resumed, file, create_optimizer_v2(resumed, opt="momentum", lr=1.0)) == 4
    for twin in (loaded, resumed):
        assert_same(list(twin.state_dict().values()), list(model.state_dict().values()))
    prefixed = {f"_orig_mod.module.{key}": value for key, value in model.state_dict().items()}
    assert list(clean_state_dict(prefixed)) == list(model.state_dict())


@contract
def check_ema(name: str) -> None:
    model = create(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ema = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    keys = [key for key in before if ".pool_skip." in key]
    assert keys
    for key in keys:
        torch.testing.assert_close(ema.module.state_dict()[key], before[key] + 0.25)
    assert_same(list(model.state_dict()), list(before))
