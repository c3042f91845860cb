# SPDX-License-Identifier: Apache-2.0
"""Datasets prepared by tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

from typing import Any

from .sources import RandomAccessSource


class TFDS(RandomAccessSource):
    """A split of a prepared dataset in a random-access format (ArrayRecord or Parquet)."""

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

        Raises:
            ValueError: if the dataset has no such field.
        """
        import tensorflow_datasets as tfds

        methods = tfds.decode.DeserializeMethod
        method = methods.DESERIALIZE_AND_DECODE if keys is None else methods.RAW_BYTES
        items = tfds.data_source(
            name, split=split, data_dir=data_dir, download=False, deserialize_method=method
        )
        super().__init__(items if keys is None else _Fields(items, keys))


class _Fields:
    """Some fields of raw records; the others are never decoded."""

    def __init__(self, records: Any, keys: tuple[str, ...]):
        import tensorflow_datasets as tfds

        features = records.dataset_info.features
        unknown = set(keys) - set(features)
        if unknown:
            raise ValueError(f'keys: {sorted(unknown)} are none of {", ".join(sorted(features))}')
        # tfds.decode.PartialDecoding, made for this, imports TensorFlow.
        self._features = tfds.features.FeaturesDict({key: features[key] for key in keys})
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._features.deserialize_example_np(self._records[index])
