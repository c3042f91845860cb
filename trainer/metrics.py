# SPDX-License-Identifier: Apache-2.0
"""Metrics for tasks of your own: weighted means, the newest value, exact counts.

They are `clu.metrics.Metric`s, and go into a `clu.metrics.Collection` with those of clu.
"""

from trainer.tasks.metrics import Count, Last, WeightedMean, broadcast_weights, mean_collection

__all__ = ['Count', 'Last', 'WeightedMean', 'broadcast_weights', 'mean_collection']
