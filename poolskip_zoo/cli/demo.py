"""`poolskip demo`: classify shipped images, show what pooling keeps, export to ONNX and compare; segment a scene."""

import argparse

from ..contexts import kept

HELP = "classify sample images, draw what pooling keeps, export to ONNX and compare; segment a road scene"
_NAME = "resnet50_poolskip"
_SEGMENTS = "deeplabv3plus_resnet18_poolskip.camvid_r180"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--name", default=_NAME, help=f"model with weights (default: {_NAME})")
    parser.add_argument("--layer", help="Pool Skip layer to draw (default: the model's first)")
    parser.add_argument("--output", default="demo_output", help="folder to write to (default: demo_output)")


def run(args: argparse.Namespace) -> int:
    """Print classes, draw, export and segment; exit status 1 if ONNX Runtime gives other classes than PyTorch."""
    from pathlib import Path

    from ..export import to_onnx
    from ..inference import Classifier, read_image
    from ..samples import first_name, sample_class, sample_paths

    classifier = Classifier.from_pretrained(args.name)
    layer = _pool_skip_layer(classifier.model, args.layer)
    paths = sample_paths(classifier.labels)
    if not paths:
        raise ValueError(f"{args.name} knows none of the sample images' classes: take a model of CIFAR-10 or ImageNet")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    images = [read_image(path) for path in paths]
    ranked = classifier(images)
    for path, best in zip(paths, ranked, strict=True):
        print(f"{path.name:<16} " + ", ".join(f"{label} {share:.1%}" for label, share in best[:3]))
    hits = sum(first_name(best[0][0]) == sample_class(path) for path, best in zip(paths, ranked, strict=True))
    print(f"{hits} of {len(paths)} as named")

    x = classifier.preprocess(images)
    picture = folder / "demo.png"
    before = _pooled_map(classifier.model.get_submodule(layer), classifier.model, x)
    _draw(picture, images, ranked, before, classifier.model.get_submodule(layer).window, layer)
    print(f"picture: {picture}")

    model_file = folder / f"{args.name}.onnx"
    outputs = to_onnx(classifier.model, x, model_file)["outputs"]
    same = outputs["agreement"] == 1
    print(f"ONNX: {model_file}; in ONNX Runtime logits differ by {outputs['max_relative_error']:.1e} of the largest")
    print("the same classes in PyTorch and ONNX Runtime" if same else "ONNX Runtime gives other classes")
    for what, milliseconds in _latencies(classifier.model, model_file, x[:1]).items():
        print(f"{what}: {milliseconds:.2f} ms for one image")
    _segment_road(folder / "road.png")
    return 0 if same else 1


def _pool_skip_layer(model, layer):
    """Name of a Pool Skip layer: the one asked for, or the first."""
    from ..layers import pool_skip_modules

    layers = pool_skip_modules(model)
    if not layers:
        raise ValueError("the model has no Pool Skip to draw: take a name that ends in _poolskip")
    layer = layer or next(iter(layers))
    if layer not in layers:
        raise ValueError(f"no Pool Skip layer {layer!r}: the model has {', '.join(layers)}")
    return layer


def _pooled_map(layer, model, x):
    """The map that a Pool Skip layer pools, (N, C, H, W): of tokens their patch grid."""
    import torch

    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode():
            model(x)
    finally:
        handle.remove()
    if seen[0].dim() == 4:
        return seen[0]
    patches = seen[0][:, layer.grid.prefix :]
    return patches.unflatten(1, layer.grid.find(seen[0].shape[1])).movedim(-1, 1)


def _draw(path, images, ranked, before, window, layer):
    """One column an image: the image, one channel before pooling, what pooling keeps of it, the class scores."""
    from ..layers import max_pool_unpool2d
    from ..pictures import new_figure, save_figure

    # The channel whose kept values vary most shows most.
    maxima = max_pool_unpool2d(before, tuple(window))
    channel = int(before.flatten(2).std(-1).mean(0).argmax())
    columns = len(images)
    figure = new_figure(1.6 * columns + 0.4, 6.6)
    axes = figure.subplots(4, columns, gridspec_kw={"height_ratios": [1, 1, 1, 0.8]})
    for i, image in enumerate(images):
        axes[0, i].imshow(image, interpolation="nearest")
        axes[0, i].set_title(ranked[i][0][0], fontsize=11)
        for row, values in ((1, before), (2, maxima)):
            scale = float(values[i, channel].abs().max())
            axes[row, i].imshow(values[i, channel], cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest")
        for place, (name, value) in enumerate(ranked[i][:3]):
            axes[3, i].barh(-place, value, color="#99c1e8")
            score = f"{value:.0%}" if value >= 0.005 else "<1%"
            axes[3, i].text(0.03, -place, f"{name} {score}", va="center", fontsize=8)
        axes[3, i].set_xlim(0, 1)
        for row in range(4):
            axes[row, i].set_xticks([])
            axes[row, i].set_yticks([])
    e = "×".join(map(str, window))
    pooled = f"channel {channel} at\n{layer}\n(red > 0 > blue)"
    for row, text in enumerate(("image", pooled, f"kept by {e} pooling", "class scores")):
        axes[row, 0].set_ylabel(text, fontsize=9)
    save_figure(figure, path)


def _segment_road(path):
    """The road scene, its segments and its ground truth side by side."""
    import numpy as np
    import torch
    from PIL import Image

    from ..inference import Segmenter, draw_segments, read_image
    from ..samples import road_scene

    scene, labelled = road_scene()
    image, truth = read_image(scene), torch.from_numpy(np.array(Image.open(labelled)))
    segmenter = Segmenter.from_pretrained(_SEGMENTS)
    labels = segmenter([image])[0]
    named = truth < len(segmenter.labels)
    panels = [torch.full_like(truth, 255), labels, truth]  # nothing is laid over the first
    with kept(path) as temporary:
        draw_segments(image, panels, segmenter.labels, segmenter.info.palette).save(temporary, "PNG")
    share = (labels == truth)[named].float().mean().item()
    print(f"{path}: a road scene, its segments by {_SEGMENTS} and the ground truth, which share {share:.1%} of pixels")


def _latencies(model, path, x):
    """Median milliseconds of the model and its base, which take turns, and of the file after them."""
    import copy

    from ..diagnostics.cost import measure_latency
    from ..export.verify import runner
    from ..layers import remove_pool_skip

    base = remove_pool_skip(copy.deepcopy(model))
    times = measure_latency([lambda: model(x), lambda: base(x)], 15)
    # By itself: ONNX Runtime's threads spin for a while after each run, which slows down what comes next.
    session, image = runner(path, "onnxruntime"), x.numpy()
    times += measure_latency([lambda: session([image])], 15)
    return dict(zip(("PyTorch", "the base model in PyTorch", "ONNX Runtime"), times, strict=True))
