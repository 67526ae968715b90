"""Batch-norm statistics at test time: adaptation to unlabelled images of where a model runs."""

from fusednorm.adapt.adaptation import Adaptation, adapt_batch_norm
from fusednorm.adapt.norms import Handler, register
from fusednorm.adapt.report import AdaptationReport, LayerShift
from fusednorm.adapt.stream import AdaptiveModel

__all__ = [
    "Adaptation",
    "AdaptationReport",
    "AdaptiveModel",
    "Handler",
    "LayerShift",
    "adapt_batch_norm",
    "register",
]
