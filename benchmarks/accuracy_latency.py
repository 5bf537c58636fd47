"""Accuracy against latency of the zoo's trained classifiers, one panel for each data set.

    python benchmarks/accuracy_latency.py [--threads 1] [--rounds 30] [--output docs/accuracy_latency.png]

Accuracies are those of the checkpoints' records, and of their bases whose weights are not published.
Latency is that of one image at the checkpoint's own size in eager mode; the models of a data set take turns. Prints a
Markdown table and draws the picture.
"""

import argparse
from pathlib import Path

import timm
import torch
from torch import nn
from turns import medians, table

import poolskip_zoo  # noqa: F401  registers the models
from poolskip_zoo.hub.verify import checkpoint_cfg
from poolskip_zoo.registry.catalogue import base_name, create_base
from poolskip_zoo.registry.checkpoint import SUFFIX, Checkpoint, SegmentationCheckpoint, checkpoints

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Point = tuple[str, float, nn.Module, torch.Tensor]


def trained() -> dict[str, list[Point]]:
    """Name, accuracy in percent, network and an image for each trained model, by data set."""
    found: dict[str, list[Point]] = {}
    for record in checkpoints(not_kept=True):
        if isinstance(record, SegmentationCheckpoint):
            continue
        points = found.setdefault(record.dataset_title, [])
        options = {"num_classes": checkpoint_cfg(record).num_classes, **record.model_args}
        name = record.name if record.sha256 else f"{record.name}, not kept"
        points.append((name, record.metrics["top1"], *placed(record, timm.create_model(record.arch, **options))))
        if "top1" in record.base_scores:
            name = base_name(record.arch) + (", trained otherwise" if record.base_note else ", not published")
            points.append((name, record.base_scores["top1"], *placed(record, create_base(record.arch, **options))))
    return found


def placed(record: Checkpoint, model: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """Network and image of a checkpoint; what they cost does not depend on the weights."""
    last = {"memory_format": torch.channels_last}
    image = torch.rand(1, *checkpoint_cfg(record).input_size, device=DEVICE)
    return model.eval().to(DEVICE, **last), image.to(**last)


def main() -> None:
    """Measure, print and draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("docs/accuracy_latency.png"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, threads: {args.threads}"
    panels = trained()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 8), squeeze=False)
    rows = [["data", "model", "accuracy, %", "latency, ms"]]
    for panel, (title, points) in zip(axes[0], panels.items(), strict=True):
        calls = [lambda model=model, x=x: model(x) for _, _, model, x in points]
        with torch.inference_mode():
            times = [1e3 * each for each in medians(calls, args.rounds, DEVICE, args.threads)]
        for (name, top1, *_), milliseconds in zip(points, times, strict=True):
            rows.append([title, f"`{name}`", f"{top1:.2f}", f"{milliseconds:.2f}"])
            ours = SUFFIX in name
            kind = {"color": "tab:blue", "label": "with Pool Skip"} if ours else {"color": "tab:gray", "label": "base"}
            panel.plot(milliseconds, top1, "o", **kind)
            offset = (7, -3) if ours else (-3, -13)  # a variant and its base are often equally accurate
            panel.annotate(name, (milliseconds, top1), offset, textcoords="offset points", fontsize="small")
        scores = [top1 for _, top1, *_ in points]
        # At least four percentage points, so that small differences look small.
        middle, half = (max(scores) + min(scores)) / 2, max(max(scores) - min(scores), 3) * 0.7
        panel.set(title=title, xlabel=f"latency of one image, ms ({where})", ylabel="top-1 accuracy, %")
        panel.set(xlim=(0, 1.9 * max(times)), ylim=(middle - half, middle + half))
        panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        panel.legend(once.values(), once.keys())
    figure.tight_layout()
    figure.savefig(args.output, dpi=120)
    print(f"### {where}, float32, channels_last, one image\n")
    print(table(rows))


if __name__ == "__main__":
    main()
