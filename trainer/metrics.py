# SPDX-License-Identifier: Apache-2.0
"""Metrics for tasks: of classification and regression, weighted means, last values and counts.

They are `clu.metrics.Metric`s and can be combined with those of clu in a `clu.metrics.Collection`.
Names in capitals, such as `AUC`, make the class of a metric; `auc` is the function of arrays.
"""

from trainer.tasks.class_metrics import (
    F1,
    CalibrationError,
    ConfusionMatrix,
    Precision,
    Recall,
)
from trainer.tasks.host_metrics import AUC, AveragePrecision, Pearson, Spearman
from trainer.tasks.loss_metrics import BitsPerUnit, Perplexity
from trainer.tasks.metrics import Count, Last, WeightedMean, broadcast_weights, mean_collection
from trainer.tasks.scores import auc, average_precision, pearson, spearman

__all__ = [
    'AUC', 'F1', 'AveragePrecision', 'BitsPerUnit', 'CalibrationError', 'ConfusionMatrix', 'Count',
    'Last', 'Pearson', 'Perplexity', 'Precision', 'Recall', 'Spearman', 'WeightedMean', 'auc',
    'average_precision', 'broadcast_weights', 'mean_collection', 'pearson', 'spearman',
]  # fmt: skip
