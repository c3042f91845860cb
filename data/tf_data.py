# SPDX-License-Identifier: Apache-2.0
"""Pipelines of tf.data, for those who have TensorFlow and such a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class TFData:
    """A `tf.data.Dataset` as a stream for `trainer.data.streaming`.

    Its place is the number of elements that were read, and a run that goes on reads over them once
    more (`Dataset.skip`): exact, and slow for a place far behind. The dataset is made anew for each
    pass, with the same seed; one that ends has the same order in each pass, and one that shuffles
    and repeats itself (`.shuffle(...).repeat()`) never ends.
    """

    def __init__(self, make: Callable[[], Any], *, seed: int = 0):
        """Keeps TensorFlow off the accelerators; nothing is read.

        Args:
            make: returns the `tf.data.Dataset` of examples, each a dict of tensors; in a config
                `dict(ref='my.pipeline:train')`.
            seed: of `tf.random`, which its shuffles follow.

        Raises:
            ValueError: if TensorFlow is missing.
            TypeError: if `make` cannot be called.
        """
        if not callable(make):
            raise TypeError(
                f'make: expected a function that returns a tf.data.Dataset, got {make!r}; in a '
                "config: make=dict(ref='my.pipeline:train')"
            )
        try:
            import tensorflow as tf
        except ImportError as error:
            raise ValueError(
                "TensorFlow is not installed: pip install 'jax-config-trainer[tf]'"
            ) from error
        for kind in ('GPU', 'TPU'):
            tf.config.set_visible_devices([], kind)
        self._make = make
        self._seed = seed

    def shard(self, index: int, count: int) -> _Part:
        """Returns every `count`-th element, from `index` on."""
        return _Part(self._make, self._seed, index, count)


class _Part:
    def __init__(self, make: Callable[[], Any], seed: int, index: int, count: int):
        self._make = make
        self._seed = seed
        self._shard = count, index

    def __iter__(self) -> _Place:
        return _Place(self.read)

    def read(self, skip: int) -> Iterator[Any]:
        import tensorflow as tf

        tf.random.set_seed(self._seed)
        dataset = self._make()
        if not isinstance(dataset, tf.data.Dataset):
            raise TypeError(f'make: expected a tf.data.Dataset, it returned {dataset!r}')
        if not isinstance(dataset.element_spec, dict):
            raise TypeError(
                'make: the elements must be dicts of tensors, one for each field of an example; '
                f'they are {dataset.element_spec}'
            )
        options = tf.data.Options()
        options.deterministic = True
        dataset = dataset.with_options(options).shard(*self._shard).skip(skip)
        return dataset.as_numpy_iterator()


class _Place:
    def __init__(self, read: Callable[[int], Iterator[Any]]):
        self._read = read
        self.set_state(0)

    def __iter__(self) -> _Place:
        return self

    def __next__(self) -> Any:
        example = next(self._elements)
        self._taken += 1
        return example

    def get_state(self) -> int:
        return self._taken

    def set_state(self, state: int) -> None:
        self._taken = state
        self._elements = self._read(state)
