"""Measures of models: of their filters, and of their cost."""

from .filters import Diagnosis, LayerDiagnosis, diagnose
from .picture import draw, table

__all__ = ["Diagnosis", "LayerDiagnosis", "diagnose", "draw", "table"]
