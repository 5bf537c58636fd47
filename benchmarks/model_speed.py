"""Whole models beside their base, the reference's composition, the floor and the base of equal cost.

    python benchmarks/model_speed.py [--threads 1] [--rounds 7] [--size 224]

* *reference*: the same weights, Pool Skip as torch's pooling with indices and unpooling, kept by autograd as they are;
* *floor*: the sparse map replaced by x itself, so that what is left is the cost of the 3×3 convolutions.

All take turns within one run; a ratio is that of medians. Prints a Markdown table.
"""

import argparse
import os
import types

import timm
import torch
from operator_speed import stock_block
from torch import Tensor, nn
from turns import clock, medians, table

import poolskip_zoo  # noqa: F401  registers the models
from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.layers.kernels import TRITON_VARIABLE

FAMILIES = {
    "resnet18_poolskip": ("resnet18", "resnet34"),
    "resnet50_poolskip": ("resnet50", "resnet101"),
}


def floor_block(layer: nn.Module, x: Tensor) -> Tensor:
    """The convolution alone."""
    return x + layer.conv(x)


def variants(name: str, device: str) -> dict[str, nn.Module]:
    """The models that take turns."""
    base, equal = FAMILIES[name]
    models = {name: timm.create_model(name), base: timm.create_model(base), equal: timm.create_model(equal)}
    for kind, block in (("reference", stock_block), ("floor", floor_block)):
        model = timm.create_model(name)
        for layer in pool_skip_modules(model).values():
            layer.forward = types.MethodType(block, layer)
        models[f"{name}, {kind}"] = model
    return {key: model.to(device, memory_format=torch.channels_last) for key, model in models.items()}


def rows_of(name: str, device: str, args: argparse.Namespace) -> list[list[str]]:
    """Milliseconds of each variant, and ours as a multiple."""
    models = variants(name, device)
    layout = {"memory_format": torch.channels_last}
    one = torch.rand(1, 3, args.size, args.size, device=device).to(**layout)
    many = torch.rand(args.batch, 3, args.size, args.size, device=device).to(**layout)

    def infer(model: nn.Module, x: Tensor) -> None:
        with torch.inference_mode():
            model(x)

    def step(model: nn.Module) -> None:
        model(many).sum().backward()
        model.zero_grad()

    results = []
    for mode, call in (("eval", lambda m: infer(m, one)), ("eval", lambda m: infer(m, many)), ("train", step)):
        for model in models.values():
            model.train(mode == "train")
        calls = [lambda m=model, call=call: call(m) for model in models.values()]
        results.append(medians(calls, args.rounds, device, args.threads))
    rows = []
    for place, key in enumerate(models):
        milliseconds = [1e3 * result[place] for result in results]
        ratios = [result[0] / result[place] for result in results]
        cells = [f"{m:.1f} ({ratio:.2f})" for m, ratio in zip(milliseconds, ratios, strict=True)]
        rows.append([f"`{key}`" if "," not in key else key, *cells])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault(TRITON_VARIABLE, "1")
    begun = clock(device, args.threads)
    rows = [row for name in FAMILIES for row in rows_of(name, device, args)]
    head = ["model", "batch 1, ms", f"batch {args.batch}, ms", f"training step at {args.batch}, ms"]
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"### {where}, float32, channels_last, {args.size} pixels; in brackets Pool Skip as a multiple of it\n")
    print(table([head, *rows]))
    print(f"\n{clock(device, args.threads) - begun:.0f} s")


if __name__ == "__main__":
    main()
