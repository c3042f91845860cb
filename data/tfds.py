# SPDX-License-Identifier: Apache-2.0
"""Source for datasets prepared by tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

import os
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
        encoded: tuple[str, ...] = (),
    ):
        """Opens the split; nothing is downloaded or prepared.

        Args:
            name: 'mnist', 'imagenet2012:5.1.0', ...
            split: 'train', 'test[:10%]', ...
            data_dir: directory of the datasets; by default that of TFDS.
            keys: fields to read; by default all.
            encoded: fields of images to read as the bytes of their files (JPEG or PNG). Images of
                different sizes can only be read like this, for the transform
                `trainer.data.images:Decode`.

        Raises:
            ValueError: if the dataset is not prepared there in a random-access format, or has no
                such split or field.
        """
        import tensorflow_datasets as tfds

        methods = tfds.decode.DeserializeMethod
        # If only some fields are asked for, only these are decoded, which takes much longer than
        # reading.
        raw = keys is not None or bool(encoded)
        method = methods.RAW_BYTES if raw else methods.DESERIALIZE_AND_DECODE
        try:
            data_dir = None if data_dir is None else os.path.expanduser(data_dir)
            items = tfds.data_source(
                name, split=split, data_dir=data_dir, download=False, deserialize_method=method
            )
        except (ValueError, LookupError, OSError, AssertionError, NotImplementedError) as error:
            where = '' if data_dir is None else f', data_dir={data_dir!r}'
            raise ValueError(
                f'TFDS cannot open split {split!r} of {name!r}{where}: {_first_line(error)}\n'
                'Only datasets in a random-access format can be read. To prepare this one:\n'
                f"  builder = tfds.builder({name!r}{where}, file_format='array_record')\n"
                '  builder.download_and_prepare()'
            ) from error
        super().__init__(_Fields(items, keys, encoded) if raw else items)


class _Fields:
    """Decodes only some fields of raw records."""

    def __init__(self, records: Any, keys: tuple[str, ...] | None, encoded: tuple[str, ...]):
        import tensorflow_datasets as tfds

        features = records.dataset_info.features
        keys = tuple(features) if keys is None else keys
        unknown = {*keys, *encoded} - set(features)
        if unknown:
            raise ValueError(
                f'keys, encoded: unknown {sorted(unknown)}; the fields are '
                f'{", ".join(sorted(features))}'
            )
        # tfds.decode.PartialDecoding, which is meant for this, imports TensorFlow.
        self._features = tfds.features.FeaturesDict({key: features[key] for key in keys})
        self._decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._decode(self._records[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        # One call of the library reads all records, which is much faster than one call each.
        records = self._records.__getitems__(indices)
        return [self._decode(record) for record in records]

    def _decode(self, record: Any) -> Any:
        return self._features.deserialize_example_np(record, decoders=self._decoders)


def _first_line(error: Exception) -> str:
    """Returns the first line of an error; the rest lists hundreds of datasets."""
    return f'{type(error).__name__}: {error}'.splitlines()[0]
