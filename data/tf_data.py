# SPDX-License-Identifier: Apache-2.0
"""A stream that reads an existing tf.data pipeline; needs TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class TFData:
    """A `tf.data.Dataset` as a stream for `trainer.data.streaming`.

    Its position is the number of elements read so far, and a resumed run skips them
    (`Dataset.skip`): exact, but slow after many elements. The dataset is created again for each
    pass with the same seed, so a finite dataset has the same order in each pass. For a new order in
    each pass, let the dataset shuffle and repeat itself (`.shuffle(...).repeat()`).
    """

    def __init__(self, make: Callable[[], Any], *, seed: int = 0):
        """Hides the accelerators from TensorFlow; reads nothing.

        Args:
            make: returns the `tf.data.Dataset` of examples, each a dict of tensors; in a config
                `dict(ref='my.pipeline:train')`.
            seed: seed of `tf.random`, which determines its shuffles.

        Raises:
            ValueError: if TensorFlow is not installed.
            TypeError: if `make` is not callable.
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
            # TensorFlow would otherwise reserve most of the memory of the accelerators that JAX
            # uses.
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

    def __iter__(self) -> _PartIterator:
        return _PartIterator(self.read)

    def read(self, skip: int) -> Iterator[Any]:
        import tensorflow as tf

        # Before the dataset is created: its operations take their seeds from the global one, and
        # from a counter that this resets.
        tf.random.set_seed(self._seed)
        dataset = self._make()
        if not isinstance(dataset, tf.data.Dataset):
            raise TypeError(f'make: expected it to return a tf.data.Dataset, got {dataset!r}')
        if not isinstance(dataset.element_spec, dict | tuple):
            raise TypeError(
                'make: expected elements that are dicts or tuples of tensors, one tensor per '
                f'field; got {dataset.element_spec}'
            )
        options = tf.data.Options()
        # Parallel reads would otherwise return elements in the order in which they finish, and
        # `skip` would skip others.
        options.deterministic = True
        # `skip` comes last: it counts the elements of this process.
        dataset = dataset.with_options(options).shard(*self._shard).skip(skip)
        return dataset.as_numpy_iterator()


class _PartIterator:
    def __init__(self, read: Callable[[int], Iterator[Any]]):
        self._read = read
        self.set_state(0)

    def __iter__(self) -> _PartIterator:
        return self

    def __next__(self) -> Any:
        example = next(self._elements)
        self._num_read += 1
        return example

    def get_state(self) -> int:
        return self._num_read

    def set_state(self, state: int) -> None:
        self._num_read = state
        self._elements = self._read(state)
