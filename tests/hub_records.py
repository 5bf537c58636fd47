"""A tiny checkpoint to be registered, published and damaged by tests."""

import timm
import torch

from poolskip_zoo.registry.checkpoint import Checkpoint
from poolskip_zoo.registry.resolve import sha256_of
from poolskip_zoo.training.state import save_weights

NAME = "test_resnet_cifar_poolskip.tiny"


def make_weights(path, seed=0):
    """Write float16 weights whose outputs depend on every layer."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet_cifar_poolskip")
    model.train()(torch.randn(16, 3, 32, 32))  # BatchNorm statistics
    save_weights(path, model, torch.float16)


def make_record(path, name=NAME, **changes):
    values = {
        "name": name,
        "dataset": "cifar10_jpeg",
        "sha256": sha256_of(path),
        "metrics": {"top1": 91.25, "top5": 99.5},
        "recipe": "resnet20_cifar_poolskip.c10",
        "seed": 3,
        "hardware": "a CPU",
        "hours": 0.25,
        "images_per_second": 123.4,
        "torch": "2.9.0",
    }
    return Checkpoint(**{**values, **changes})
