"""The fold: can x + conv(u) gain from u being zero in all but one of e² places? Without it, `F.conv2d` reads them all.

    python benchmarks/fold.py [--rounds 15]

Two forms of plain PyTorch that skip the zeros, on the maps of `resnet50_poolskip` at 224 pixels, e=4, one image, one
thread, beside the dense convolution; all give its sums within 1e-4. Times include making the operands from the window
maxima, without which neither can run. Prints a Markdown table.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import medians, table

E = 4
# Channels and height; the last two maps, 14 and 7, are rounded up to whole windows.
MAPS = [(64, 56), (128, 28), (256, 16), (512, 8)]


def sparse(u: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Rows of non-zeros per pixel times the 9 taps at once, then the taps added at their places: the least products."""
    out, channels, height, width = *weight.shape[:2], *u.shape[2:]
    taps = weight.flip(2, 3).permute(1, 0, 2, 3).reshape(channels, out * 9)

    def run() -> Tensor:
        rows = u[0].permute(1, 2, 0).reshape(height * width, channels).to_sparse_csr()
        return F.fold((rows @ taps).t()[None], (height, width), 3, padding=1)

    return run


def bags(values: Tensor, indices: Tensor, size: torch.Size, weight: Tensor) -> Callable[[], Tensor]:
    """A weighted sum of ready 6×6 patches, one for each channel and place in the window, then the patches added."""
    out, channels = weight.shape[:2]
    places = torch.eye(E * E).view(E * E, 1, E, E)
    filters = weight.permute(1, 0, 2, 3).reshape(channels * out, 1, 3, 3)
    patches = F.conv2d(places, filters, padding=2).view(E * E, channels, out * 36)
    ready = patches.transpose(0, 1).reshape(channels * E * E, out * 36)
    first = torch.arange(channels) * E * E

    def run() -> Tensor:
        row, column = indices // size[1] % E, indices % size[1] % E
        bag = (row * E + column)[0].flatten(1).t() + first
        summed = F.embedding_bag(bag, ready, mode="sum", per_sample_weights=values[0].flatten(1).t().contiguous())
        return F.fold(summed.t()[None], size, E + 2, padding=1, stride=E)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [["map", "dense, ms", "sparse rows, ms (dense / sparse)", "bags of patches, ms (dense / bags)"]]
    with torch.inference_mode():
        for channels, size in MAPS:
            x = torch.randn(1, channels, size, size)
            weight = torch.randn(channels, channels, 3, 3) / channels
            values, indices = F.max_pool2d(x, E, E, return_indices=True)
            u = F.max_unpool2d(values, indices, E, E, output_size=x.shape[2:])
            last = u.to(memory_format=torch.channels_last)
            forms = [
                lambda last=last, weight=weight: F.conv2d(last, weight, padding=1),
                sparse(u, weight),
                bags(values, indices, x.shape[2:], weight),
            ]
            for form in forms[1:]:
                torch.testing.assert_close(form(), forms[0](), rtol=1e-4, atol=1e-4)
            times = [1e3 * each for each in medians(forms, args.rounds, "cpu", 1)]
            cells = [f"{each:.2f} ({times[0] / each:.2f})" for each in times[1:]]
            rows.append([f"{channels}×{size}×{size}", f"{times[0]:.2f}", *cells])
    print(table(rows))


if __name__ == "__main__":
    main()
