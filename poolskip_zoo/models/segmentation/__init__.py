"""Encoders and heads for segmentation-models-pytorch.

Importing smp registers what is in here, so smp comes before every module of this folder: registration would otherwise
meet the one half-imported that had asked for smp.
"""

import segmentation_models_pytorch  # noqa: F401
