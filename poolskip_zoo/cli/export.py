"""`poolskip export`: a model as a file for a runtime, checked in that runtime."""

import argparse
from pathlib import Path
from typing import Any

HELP = "export a model to ONNX, OpenVINO, TorchScript, LiteRT, ExecuTorch, …, checked in the runtime"
# Format to the suffixes of its files, the usual one first, its writer in `export`, and the options that it takes.
_FORMATS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "onnx": ((".onnx",), "to_onnx", ("target", "lowering", "half", "dynamic", "opset")),
    "openvino": ((".xml",), "to_openvino", ("lowering", "half", "dynamic")),
    "torchscript": ((".pt", ".pth", ".ts", ".jit", ".torchscript"), "to_torchscript", ("dynamic",)),
    "pt2": ((".pt2",), "to_exported_program", ("lowering", "dynamic")),
    "coreml": ((".mlpackage",), "to_coreml", ("lowering", "dynamic")),
    "litert": ((".tflite",), "to_litert", ("lowering", "dynamic")),
    "executorch": ((".pte",), "to_executorch", ("lowering", "dynamic")),
    "ncnn": ((".param",), "to_ncnn", ("dynamic",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "name", metavar="NAME_OR_DIR", help="any timm model, checkpoint of ours, or folder of a run or timm"
    )
    parser.add_argument("--target", help="runtime: onnxruntime (default), openvino, web, litert, executorch, coreml, …")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: the name in this folder)")
    parser.add_argument("--format", choices=_FORMATS, help="default: by the suffix of --output, else the target's")
    parser.add_argument(
        "--dynamic",
        nargs="*",
        metavar="AXIS",
        help="axes to leave open: batch height width; without any, all are fixed (default: batch; for litert, ncnn, "
        "executorch and coreml none). For the last two --batch and --size are the largest",
    )
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="input size (default: the model's)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images of the example (default: 1)")
    parser.add_argument("--opset", type=int, help="ONNX operator set (default: 18)")
    parser.add_argument("--half", action="store_true", help="float16 weights and computation")
    parser.add_argument("--lowering", help="keys, native, scatter or arith in place of the target's own")
    parser.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load weights (default); --no-pretrained takes random ones",
    )


def run(args: argparse.Namespace) -> int:
    """Write and check the file, and print what was measured."""
    import torch

    from .. import export

    for option, numbers in (("--batch", [args.batch]), ("--size", args.size or [])):
        if any(number < 1 for number in numbers):
            raise ValueError(f"{option} {' '.join(map(str, numbers))} must be at least 1")
    suffix = (args.output or Path()).suffix
    by_suffix = next((key for key, (suffixes, *_) in _FORMATS.items() if suffix in suffixes), None)
    if args.output and not by_suffix and not args.format:
        known_suffixes = ", ".join(each for suffixes, *_ in _FORMATS.values() for each in suffixes)
        raise ValueError(f"--output {args.output}: expected a name that ends in one of {known_suffixes}")
    own = args.target if args.target in ("coreml", "litert", "executorch") else None
    kind = args.format or by_suffix or own or "onnx"
    suffixes, writer, known = _FORMATS[kind]
    path = args.output or Path(Path(args.name).name + suffixes[0])
    if args.dynamic is not None:
        args.dynamic = tuple(args.dynamic)
    options = _options(args, kind, known)
    model, metadata = _loaded(args.name, args.pretrained)
    if not args.pretrained:
        del metadata["checkpoint"]
    channels, *size = metadata["input_size"]
    example = torch.randn(args.batch, channels, *(args.size or size), generator=torch.Generator().manual_seed(0))
    metadata["input_size"] = list(example.shape[1:])
    if args.size:
        _check_size(model, example, args.name)
    report = getattr(export, writer)(model, example, path, metadata=metadata, **options)
    found = report["outputs"]
    weights = [path.with_suffix(".bin")] if kind in ("openvino", "ncnn") else []
    files = [each for each in (path, *path.rglob("*"), *weights) if each.is_file()]
    checked = f", checked in {report['checked_in']}" if "checked_in" in report else ""
    print(f"{path} ({sum(each.stat().st_size for each in files) / 1e6:.1f} MB){checked}")
    if "blocks" in report:
        checks = report.get("bit_comparisons")
        equal = f", equal to torch's to the bit in {checks} checks" if checks else ""
        print(f"unpoolings: {len(report['blocks'])}{equal}")
        for block in report["blocks"]:
            if block["reason"]:
                print(f"  {block['source']}: {block['lowering']}: {block['reason']}")
    flipped = f", windows flipped {found['flipped_windows']:.2%}" if "flipped_windows" in found else ""
    print(
        f"outputs: largest relative error {found['max_relative_error']:.1e}, classes equal {found['agreement']:.2%}"
        f"{flipped}, at inputs {found['inputs']}"
    )
    return 0


def _check_size(model: Any, example: Any, name: str) -> None:
    """Refuse a size that the model does not take, whatever axes are open."""
    import torch

    from ..export.verify import first_line

    try:
        with torch.no_grad():
            model(example)
    except (RuntimeError, AssertionError, ValueError) as error:
        height, width = example.shape[2:]
        raise ValueError(f"--size {height} {width}: {name} does not take it: {first_line(error)}") from error


def _options(args: argparse.Namespace, kind: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Keywords of the writer; options that the format does not have are refused."""
    given = {key: getattr(args, key) for key in ("target", "lowering", "half", "dynamic", "opset")}
    options = {key: value for key, value in given.items() if value is not None and value is not False}
    if options.get("target") == kind:
        options.pop("target")
    for key in options:
        if key not in known:
            value = "" if options[key] is True else f" {options[key]}"
            raise ValueError(f"--{key}{value}: {kind} files take no such option but --{', --'.join(known)}")
    return options


def _loaded(name: str, pretrained: bool) -> tuple[Any, dict[str, Any]]:
    """A model, and what a predictor needs to know of it."""
    from ..registry.checkpoint import find
    from .subject import load

    subject = load(name, pretrained=pretrained, way_out="--no-pretrained exports random ones")
    if subject.segments:
        return subject.model, _of_segmentation(subject)
    if not hasattr(subject.model, "pretrained_cfg"):
        recorded = f"give its name, {Path(name).name}, or " if find(Path(name).name) else ""
        raise ValueError(
            f"{name} does not say what images it takes: {recorded}load its model in Python (smp's folders by "
            "smp.from_pretrained) and give it to poolskip_zoo.export"
        )
    return subject.model, _of_classification(subject)


def _of_segmentation(subject: Any) -> dict[str, Any]:
    from ..inference import Segmenter

    segmenter = Segmenter(subject.model, subject.dataset)
    # smp's encoders take multiples of 32.
    side = -(-(subject.recipe.image_size or 256) // 32) * 32
    return {
        "task": "segmentation",
        "input_size": [3, side, side],
        "mean": segmenter.info.mean,
        "std": segmenter.info.std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "class_names": segmenter.labels,
        "checkpoint": Path(subject.name).name,
    }


def _of_classification(subject: Any) -> dict[str, Any]:
    from timm.data import resolve_model_data_config

    from ..inference import Classifier

    config = resolve_model_data_config(subject.model)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    cfg = subject.model.pretrained_cfg
    return {
        "task": "classification",
        **{key: config[key] for key in keys},
        "class_names": Classifier(subject.model).labels,
        "checkpoint": f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else Path(subject.name).name,
    }
