# SPDX-License-Identifier: Apache-2.0
"""Texts, images, histograms, figures and arrays that tasks, scores and hooks may return."""

from trainer.observe.summaries import Arrays, Histogram, Images, Texts, image_of_figure

__all__ = ['Arrays', 'Histogram', 'Images', 'Texts', 'image_of_figure']
