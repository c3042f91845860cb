# SPDX-License-Identifier: Apache-2.0
"""Summaries that a score may return: texts, images and arrays for `summaries/` and TensorBoard."""

from trainer.observe.summaries import Arrays, Images, Texts, image_of_figure

__all__ = ['Arrays', 'Images', 'Texts', 'image_of_figure']
