"""`poolskip prune`: a model without the filters that do nothing, as a file."""

import argparse
from pathlib import Path
from typing import Any

HELP = "remove a model's inert and dead filters, measure what that costs, and write the result"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    what = "model of timm or ours with a tag, safetensors file, or run folder"
    parser.add_argument("name", metavar="NAME_OR_RUN", help=what)
    parser.add_argument(
        "--data-dir",
        help="data folder, for dead filters and the accuracy (default: the environment variable POOLSKIP_DATA_DIR)",
    )
    parser.add_argument("--dataset", help="data set (default: the one that the checkpoint was trained on)")
    parser.add_argument(
        "--images", type=int, default=512, metavar="N", help="held-out images for dead filters, 0: none (default: 512)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=".pt2 (torch.export) or .onnx (default: the name with .pt2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Write the pruned model, and print what was removed and measured."""
    import json

    import torch

    from ..diagnostics.cost import count_macs, count_parameters
    from ..export.targets import check_output
    from ..pruning import prune_inert
    from .subject import FRESH, load

    path = check_output(args.output or f"{Path(args.name).name}.pruned.pt2", ".pt2", ".onnx")
    if args.images < 0:
        raise ValueError(f"--images {args.images} must be at least 0")
    subject = load(args.name, pretrained=None)
    if subject.weights == FRESH:
        raise ValueError(
            f"{args.name} has no tag, so its weights are fresh ones: `poolskip list --pretrained` has tags"
        )
    subject.dataset = args.dataset or subject.dataset
    if subject.segments:
        raise ValueError(f"{args.name} segments: only classifiers are pruned")
    size = subject.input_size
    images, test = _images(args, subject)
    model, what = prune_inert(subject.model, torch.zeros(1, *size), images)
    pair = {"before": subject.model.eval(), "after": model}
    facts: dict[str, Any] = {
        when: {"parameters": count_parameters(each), "macs": count_macs(each, size)} for when, each in pair.items()
    }
    if test is not None:
        from ..training.evaluate import evaluate

        for when, each in pair.items():
            facts[when]["top1"] = evaluate(each, test).top1
    facts.update({"removed": what.removed, "left": what.left, "file": str(path)})
    facts.update({"images": sum(map(len, images or ())), "seen_in_training": subject.has_seen_all})
    _write(model, size, path, facts)
    print(json.dumps(facts) if args.json else _told(args.name, facts))
    return 0


def _images(args: argparse.Namespace, subject: Any) -> tuple[Any, Any]:
    """Held-out images to find dead filters with, and the test set; None and None without a data folder."""
    import torch

    from ..data import DATASETS, EvalLoader
    from ..data.datasets import HOLD_OUT, SegmentationInfo
    from .images import has_data, image_batches

    known = [name for name, info in DATASETS.items() if not isinstance(info, SegmentationInfo)]
    if not has_data(args, subject, known):
        return None, None
    hold_out = subject.recipe.hold_out if subject.recipe and subject.recipe.hold_out > 0 else HOLD_OUT
    shared: dict[str, Any] = {"device": torch.device("cpu"), "hold_out": hold_out}
    held_out = image_batches(subject, args.data_dir, args.images, **shared) if args.images else None
    test = image_batches(subject, args.data_dir, 10**9, **shared, split="test")
    images = None if held_out is None else [batch if torch.is_tensor(batch) else batch[0] for batch in held_out]
    # Without labels, if the data set's classes are not the model's: there is nothing to measure.
    return images, test if isinstance(test, EvalLoader) else None


def _write(model: Any, size: tuple[int, int, int], path: Path, facts: dict[str, Any]) -> None:
    import torch

    from .. import export

    writer = export.to_onnx if path.suffix == ".onnx" else export.to_exported_program
    example = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    writer(model, example, path, metadata={"pruned": facts})


def _told(name: str, facts: dict[str, Any]) -> str:
    before, after = facts["before"], facts["after"]
    removed, left = (sum(facts[key].values()) for key in ("removed", "left"))
    lines = [f"{name}: {removed} filters removed, {left} inert or dead ones left"]
    if facts["images"]:
        seen = ", which it was trained on" if facts["seen_in_training"] else ""
        lines.append(f"dead filters by {facts['images']} images{seen}")
    for key in ("removed", "left"):
        lines += [f"  {key} in {layer}: {count}" for layer, count in facts[key].items()]
    lines.append(f"parameters {before['parameters']:,} -> {after['parameters']:,}")
    lines.append(f"multiply-accumulates {before['macs']:,} -> {after['macs']:,}")
    if "top1" in before:
        lines.append(f"top-1 on the test set {before['top1']:.2f} % -> {after['top1']:.2f} %")
    return "\n".join([*lines, facts["file"]])
