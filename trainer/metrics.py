# SPDX-License-Identifier: Apache-2.0
"""Metrics for custom tasks: weighted means, latest values and exact counts.

They are `clu.metrics.Metric`s and can be combined with those of clu in a `clu.metrics.Collection`.
"""

from trainer.tasks.metrics import Count, Last, WeightedMean, broadcast_weights, mean_collection

__all__ = ['Count', 'Last', 'WeightedMean', 'broadcast_weights', 'mean_collection']
