"""What a registered variant keeps of its base: one plain function of a model name per habit of timm's users.

Each check of `CHECKS` raises on the first difference and returns False if the model cannot do the thing at all: what
the base refuses the variant must refuse too, with the same class of error.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{module}" for module in ("common", "model", "features", "graphs", "training"))
)

from . import features, graphs, model, training  # noqa: E402, F401
from .common import CHECKS, assert_same, create, images, load_base  # noqa: E402

__all__ = ["CHECKS", "assert_same", "create", "images", "load_base"]
