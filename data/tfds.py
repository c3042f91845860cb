# SPDX-License-Identifier: Apache-2.0
"""Datasets prepared by tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

from .sources import RandomAccessSource


class TFDS(RandomAccessSource):
    """A split of a prepared dataset in a random-access format (ArrayRecord or Riegeli)."""

    def __init__(
        self,
        name: str,
        *,
        split: str,
        data_dir: str | None = None,
        keys: tuple[str, ...] | None = None,
    ):
        """Opens the split; nothing is downloaded or prepared.

        Args:
            name: 'mnist', 'imagenet2012:5.1.0', ...
            split: 'train', 'test[:10%]', ...
            data_dir: where the datasets are; by default TFDS's own directory.
            keys: fields to read; by default all.
        """
        import tensorflow_datasets as tfds

        decoders = None if keys is None else tfds.decode.PartialDecoding(dict.fromkeys(keys, True))
        super().__init__(
            tfds.data_source(
                name, split=split, data_dir=data_dir, download=False, decoders=decoders
            )
        )
