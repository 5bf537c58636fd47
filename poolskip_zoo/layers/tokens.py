"""Pool Skip on the patch tokens of a timm ViT.

Tokens do not say how high and wide their grid is, and a block is not told. All Pool Skip layers of a model share one
`Grid` that knows. Where the model takes one image size, it is fixed. Where it takes any (`dynamic_img_size`), the patch
embedding notes each image's grid; that is state, and kept right in three forms:

* *eager*: remembered per thread and number of patches, so that threads do not mix and gradient checkpointing, which
  runs blocks again in the backward (on another thread with CUDA), finds the grid of each image size.
* *capture* (`torch.compile`, export, tracing): plain attributes, through which the sizes flow into the graph.
* *scripted*: a table in a CPU tensor, because scripting copies numbers for each layer but keeps tensors shared.

What is left concerns images of equally many patches and another aspect, at the same time: two of them before one
backward with checkpointing raise CheckpointError (with `use_reentrant=True` the gradients are wrong); threads need a
copy each of a scripted model, or of one whose blocks are compiled one by one.
"""

import threading
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from .pool_skip import PoolSkip2d

__all__ = ["Grid", "GridPatchEmbed", "TokenPoolSkip2d", "attach_grid", "check_grid", "detach_grid"]


class _Seen(threading.local):
    """Number of patches to grid, of the images that this thread has passed."""

    def __init__(self) -> None:
        self.grids: dict[int, tuple[int, int]] = {}


class Grid(nn.Module):
    """Height and width, in patches, of the image that passes: known or noted by the patch embedding, asked by blocks.

    Copies and pickles remember no image, and nothing enters the state dict.

    Args:
        prefix: number of tokens before the patches (class, register and distillation tokens).
        fixed: whether all images have one size, set by `resize`.

    Shape:
        (N, C, h, w), the output alike.
    """

    # Final: scripting leaves out the other branch. A fixed grid then scripts without state, and can be frozen.
    fixed: torch.jit.Final[bool]
    prefix: int
    height: int
    width: int
    slots: int
    base: int
    table: Tensor

    def __init__(self, prefix: int, fixed: bool) -> None:
        super().__init__()
        self.prefix = prefix
        self.fixed = fixed
        # Numbers of patches that are equal modulo `slots` share an entry; `find` tells them apart by the product.
        self.slots = 1024
        # Height and width in one number, height · base + width: written in one piece, never half.
        self.base = 1 << 20
        self.height = self.width = 0
        self._forget()

    def _forget(self) -> None:
        # Always real and on the CPU, also where a model is built on the meta device.
        self.table = torch.zeros(self.slots, dtype=torch.int64, device="cpu")
        self._of_thread = _Seen()
        self._latest: dict[int, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in ("table", "_of_thread", "_latest")}
        # After a capture they may be symbols, which cannot be copied.
        return state if self.fixed else {**state, "height": 0, "width": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def resize(self, height: int, width: int) -> None:
        """Set the one size of a fixed grid, in rows and columns of patches."""
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        """Note the size of the patch embedding's map, unless it is fixed, and return the map itself."""
        if not self.fixed:
            height, width = x.shape[2], x.shape[3]
            if torch.jit.is_scripting():
                self.table[(height * width) % self.slots] = height * self.base + width
            else:
                self.height, self.width = height, width
                if not _is_symbolic(height * width):
                    self._latest[height * width] = (height, width)
                    self._of_thread.grids[height * width] = (height, width)
        return x

    def find(self, tokens: int) -> tuple[int, int]:
        """Height and width, in patches, of the grid that so many tokens, prefix included, fill.

        Raises RuntimeError if the patch embedding has seen no image of so many patches.
        """
        if torch.jit.is_scripting():
            if self.fixed:
                height, width = self.height, self.width
            else:
                noted = int(self.table[(tokens - self.prefix) % self.slots])
                height, width = noted // self.base, noted % self.base
            if height * width + self.prefix != tokens:
                raise RuntimeError(
                    "the number of tokens is not that of the patch grid: were tokens dropped or merged, or do threads "
                    "run one scripted model at several image sizes?"
                )
            return height, width
        if _is_symbolic(tokens):
            return self.height, self.width
        return self._recall(tokens - self.prefix)

    def _recall(self, patches: int) -> tuple[int, int]:
        if self.fixed:
            known = {self.height * self.width: (self.height, self.width)}
        else:
            # A backward on the GPU recomputes on a thread of its own, which has seen no image.
            known = {**self._latest, **self._of_thread.grids}
        if patches not in known:
            sizes = ", ".join(f"{h}x{w}" for h, w in known.values()) or "none yet"
            raise RuntimeError(
                f"no patch grid of {patches} patches (and {self.prefix} prefix tokens), only {sizes}: Pool Skip needs "
                "every patch token in its place, and the patch embedding of its model run before the blocks. What was "
                "copied out of it, as by PEFT's modules_to_save=['pool_skip'], is not of it (take 'pool_skip.conv')"
            )
        return known[patches]

    def extra_repr(self) -> str:
        return f"prefix={self.prefix}, fixed={self.fixed}"


def _is_symbolic(size: int) -> bool:
    # Sizes are tensors while torch.jit traces, proxies while torch.fx does, and symbols in a dynamic export. Not
    # `is_compiling`, which tells of the whole process: other threads run eagerly meanwhile, at sizes of their own.
    return torch.compiler.is_dynamo_compiling() or not isinstance(size, int)


class TokenPoolSkip2d(PoolSkip2d):
    """Pool Skip on the patch tokens of a ViT, arranged as the grid that they are; prefix tokens pass unchanged.

    Args:
        channels: channels C of the tokens.
        grid: the model's grid, from `attach_grid`.
        options: keyword arguments of `PoolSkip2d`.

    Shape:
        (N, prefix + h·w, C), the output alike.

    Raises:
        ValueError: as `PoolSkip2d`; in the forward, if the input has another number of dimensions.
        RuntimeError: in the forward, if the patch embedding has seen no image of so many patches.
    """

    def __init__(self, channels: int, grid: Grid, **options: Any) -> None:
        super().__init__(channels, **options)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"tokens of shape {list(x.shape)}: expected 3 dimensions (batch, tokens, channels)")
        height, width = self.grid.find(x.shape[1])
        prefix = self.grid.prefix
        # Tokens are channels last already: no copy.
        patches = x[:, prefix:].reshape(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2)
        patches = self.add_to(patches).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([x[:, :prefix], patches], dim=1) if prefix > 0 else patches


class GridPatchEmbed(PatchEmbed):
    """timm's patch embedding while Pool Skip is on: `set_input_size` tells the grid too."""

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        grid = _take_grid(self.proj)
        try:
            # A new patch size brings a new convolution.
            super().set_input_size(*args, **kwargs)
        finally:
            _give_grid(self, grid)
        if grid.fixed:
            grid.resize(*self.dynamic_feat_size(self.img_size))


# tuple[Tensor] as TorchScript wants it: a convolution has one input.
def _note_grid(self, input: tuple[Tensor], output: Tensor) -> Tensor:
    return self.pool_skip_grid(output)


def _give_grid(embed: PatchEmbed, grid: Grid) -> None:
    embed.proj.pool_skip_grid = grid
    embed.proj.register_forward_hook(_note_grid)


def _take_grid(proj: nn.Module) -> Grid:
    grid: Any = getattr(proj, "pool_skip_grid", None)
    if grid is None:
        raise RuntimeError(
            "the patch embedding's convolution was replaced, and with it what notes the patch grid for Pool Skip: call "
            "remove_pool_skip(model) before and add_pool_skip(model) after"
        )
    del proj.pool_skip_grid
    for key, hook in list(proj._forward_hooks.items()):
        if hook is _note_grid:
            del proj._forward_hooks[key]
    return grid


def check_grid(model: nn.Module) -> nn.Module:
    """Find the module with `patch_embed` and `num_prefix_tokens`: the timm ViT that a model is or holds.

    Raises ValueError if there is none or more than one, or if it drops patches.
    """
    found = [module for module in model.modules() if _has_grid(module)]
    name = type(model).__name__
    if not found:
        raise ValueError(
            f"{name} has no timm patch grid: Pool Skip after a Linear needs a ViT with `num_prefix_tokens` and a "
            f"`patch_embed` of class timm.layers.PatchEmbed (not NaFlexVit, use_naflex=True, nor a hybrid)"
        )
    if len(found) > 1:
        raise ValueError(f"{name} has {len(found)} patch grids: add Pool Skip to each ViT by itself")
    drop = getattr(found[0], "patch_drop", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        raise ValueError(f"{name} drops patches (patch_drop_rate > 0): Pool Skip needs the whole patch grid, set it 0")
    return found[0]


def _has_grid(module: nn.Module) -> bool:
    # Exact classes: a subclass may do anything with the grid, and attach_grid changes the class.
    exact = type(getattr(module, "patch_embed", None)) in (PatchEmbed, GridPatchEmbed)
    return exact and isinstance(getattr(module, "num_prefix_tokens", None), int)


def attach_grid(model: nn.Module) -> Grid:
    """Make a model's patch embedding note its grid, the one that all its layers share; a second call returns the same.

    The ViT is fully built: a distilled DeiT counts its prefix tokens last. Raises ValueError as `check_grid`.
    """
    vit: Any = check_grid(model)
    embed = vit.patch_embed
    if not isinstance(embed, GridPatchEmbed):
        fixed = embed.strict_img_size and embed.img_size is not None
        grid = Grid(vit.num_prefix_tokens, fixed)
        if fixed:
            grid.resize(*embed.dynamic_feat_size(embed.img_size))
        _give_grid(embed, grid)
        embed.__class__ = GridPatchEmbed
    return embed.proj.pool_skip_grid


def detach_grid(model: nn.Module) -> None:
    """Undo `attach_grid`, in place; a model without a grid stays as it is."""
    for module in model.modules():
        if isinstance(module, GridPatchEmbed):
            if hasattr(module.proj, "pool_skip_grid"):  # and no convolution put in since
                _take_grid(module.proj)
            module.__class__ = PatchEmbed  # type: ignore[assignment]
