"""Training steps of the zoo's recipes under the settings that decide their speed.

    python benchmarks/training_settings.py [--threads 1] [--rounds 5] [--batch 64]

Each line adds one setting to the line above it. All lines of a model take turns within one run; a ratio is that of
medians to the first. Prints a Markdown table.
"""

import argparse
from collections.abc import Callable
from typing import Any

import timm.layers
import torch
from torch.nn import functional as F
from turns import clock, medians, table

import poolskip_zoo  # noqa: F401  registers the models
from poolskip_zoo.training.build import create_classifier

# Model, its keywords and the size of its images.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet20_cifar_poolskip": ({}, 32),
    "resnet50": ({"stem_stride": 2}, 48),
    "resnet50_poolskip": ({"stem_stride": 2}, 48),
    "vit_tiny_patch4_32_poolskip": ({}, 32),
}
SETTINGS = ("float32", "bfloat16", "channels_last", "compiled")
OF_VITS = ("float32", "bfloat16", "plain attention", "compiled")


def step_of(name: str, given: tuple[str, ...], args: argparse.Namespace, device: str) -> Callable[[], None]:
    """A training step of a fresh model under some settings."""
    arguments, size = MODELS[name]
    # As TIMM_FUSED_ATTN does for a whole process.
    timm.layers.set_fused_attn("plain attention" not in given)
    model = create_classifier(name, "tiny_imagenet_jpeg", arguments).to(device).train()
    images = torch.rand(args.batch, 3, size, size, device=device)
    if "channels_last" in given:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    if "compiled" in given:
        model.compile(dynamic=False)
    labels = torch.randint(200, (args.batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled="bfloat16" in given):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows_of(name: str, args: argparse.Namespace, device: str) -> list[list[str]]:
    """Images per second under each setting, and how much faster than the first."""
    settings = OF_VITS if name.startswith("vit") else SETTINGS
    steps = [step_of(name, settings[: count + 1], args, device) for count in range(len(settings))]
    seconds = medians(steps, args.rounds, device, args.threads)
    rows = []
    for place, (setting, each) in enumerate(zip(settings, seconds, strict=True)):
        first = [f"`{name}`, {MODELS[name][1]}", setting] if place == 0 else ["", f"+ {setting}"]
        rows.append([*first, f"{args.batch / each:.0f}", f"{seconds[0] / each:.2f}"])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = clock(device, args.threads)
    rows = [row for name in MODELS for row in rows_of(name, args, device)]
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"### {where}, batches of {args.batch}\n")
    print(table([["model, pixels", "settings", "images/s", "times the first"], *rows]))
    print(f"\n{clock(device, args.threads) - begun:.0f} s")


if __name__ == "__main__":
    main()
