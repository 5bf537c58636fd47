"""`poolskip rewrite`: any ONNX file with max-unpooling in the form that a runtime runs."""

import argparse
from pathlib import Path

HELP = "replace max-unpooling in an ONNX file from any exporter by a form that a runtime runs, checked in it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("source", type=Path, metavar="IN.onnx", help="file with MaxUnpool, or a scatter by max indices")
    parser.add_argument("output", type=Path, metavar="OUT.onnx", help="file to write")
    parser.add_argument(
        "--target",
        default="onnxruntime",
        help="runtime: onnxruntime (default), onnxruntime-cuda, openvino, web, ncnn, …",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        type=int,
        metavar="N",
        help="sizes to check at, one for each that the file leaves open after the batch, such as 224 224",
    )
    parser.add_argument("--lowering", help="keys, native, scatter or arith in place of the target's own")


def run(args: argparse.Namespace) -> int:
    """Write and check the new file, and print what was done."""
    from ..export import rewrite_onnx

    report = rewrite_onnx(args.source, args.output, args.target, lowering=args.lowering, size=args.size)
    nodes, found = report["nodes"], report["outputs"]
    print(f"{args.output} ({args.output.stat().st_size / 1e6:.1f} MB), nodes {nodes['before']} → {nodes['after']}")
    print(f"equal to the original to the bit in {report['bit_comparisons']} checks of:")
    for block in report["blocks"]:
        print(f"  {block['source']}: {block['lowering']}" + (f": {block['reason']}" if block["reason"] else ""))
    print(
        f"outputs: largest relative error {found['max_relative_error']:.1e}, classes equal {found['agreement']:.2%}, "
        f"windows flipped {found['flipped_windows']:.2%}, at inputs {found['inputs']}"
    )
    return 0
