# SPDX-License-Identifier: Apache-2.0
"""What tasks, scores and hooks may return: texts, images, histograms, figures and arrays."""

from trainer.observe.summaries import Arrays, Histogram, Images, Texts, image_of_figure

__all__ = ['Arrays', 'Histogram', 'Images', 'Texts', 'image_of_figure']
