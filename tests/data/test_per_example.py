# SPDX-License-Identifier: Apache-2.0
"""Functions of one example: fields, random states, and objects of other libraries."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from trainer.data.grain_loader import GrainLoader
from trainer.data.loader import TrainLoader
from trainer.data.per_example import PerExample
from trainer.data.rng import ExampleRng
from trainer.data.sources import ArraySource

N = 40


def source() -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3)).astype(np.uint8)
    return ArraySource({'image': pixels, 'label': np.arange(N)})


def rng(ids: Any = range(N)) -> ExampleRng:
    return ExampleRng(0, 0, np.zeros(len(ids), np.int64), np.asarray(ids))


def images(transform: Any, start: int = 0, count: int = 1, kind: Any = TrainLoader) -> np.ndarray:
    loader = kind(source=source(), batch_size=N, transforms=(transform,), shuffle=False)
    try:
        return loader.block(start, count).arrays['image']
    finally:
        if kind is GrainLoader:
            loader.close()


def mirror(image: np.ndarray) -> np.ndarray:
    return image[:, ::-1]


def shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image + rng.integers(1, 100)


def add_python_noise(image: np.ndarray) -> np.ndarray:
    return image + np.uint8(random.randrange(256))


def add_numpy_noise(image: np.ndarray) -> np.ndarray:
    return image + np.uint8(np.random.randint(256))


def test_a_function_of_one_field_leaves_the_others() -> None:
    batch = source().gather(np.arange(N))
    result = PerExample(fn=mirror, field='image')(batch, rng())
    np.testing.assert_array_equal(result['image'], batch['image'][:, :, ::-1])
    assert result['label'] is batch['label']


def test_a_function_of_one_field_gets_the_generator_of_its_example() -> None:
    batch = source().gather(np.arange(N))
    run = PerExample(fn=shift, field='image')
    whole = run(batch, rng())['image']
    part = run({name: x[[7, 3]] for name, x in batch.items()}, rng([7, 3]))['image']
    np.testing.assert_array_equal(part, whole[[7, 3]])
    assert len({int(x.sum()) for x in whole - batch['image']}) > 10


def test_functions_implemented_in_c_and_arrays_of_other_libraries() -> None:
    batch = {'x': np.arange(6.0).reshape(3, 2)}
    assert PerExample(fn=np.negative, field='x')(batch, rng(range(3)))['x'].tolist() == [
        [0, -1], [-2, -3], [-4, -5]
    ]  # fmt: skip
    summed = PerExample(fn=jnp.sum, field='x')(batch, rng(range(3)))['x']
    assert type(summed) is np.ndarray and summed.tolist() == [1, 5, 9]


@pytest.mark.parametrize(
    ('fn', 'field', 'message'),
    [
        (mirror, 'picture', "the batch has no 'picture'; it has image, label"),
        (lambda image: None, 'image', "'image': the function returned None"),
        (
            lambda image: image[: image[0, 0, 0] % 8],
            'image',
            'all examples of a batch need one shape',
        ),
        (lambda example: example['image'], None, r'name that field: PerExample\(fn=..., field='),
        (lambda x: {f'x{x["label"]}': 0}, None, 'need the same fields.*has the keys x1, not x0'),
    ],
)
def test_mistakes_are_named(fn: Callable[..., Any], field: str | None, message: str) -> None:
    batch = source().gather(np.arange(N))
    with pytest.raises((TypeError, ValueError), match=message):
        PerExample(fn=fn, field=field)(batch, rng())


def test_only_functions_are_accepted() -> None:
    for wrong in ('mirror', ArraySource):
        with pytest.raises(ValueError, match='fn: expected a function of an example'):
            PerExample(fn=wrong)


@pytest.mark.parametrize(
    ('fn', 'name'), [(add_python_noise, 'random'), (add_numpy_noise, 'numpy.random')]
)
def test_global_generators_are_an_error_or_seeded(fn: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match=f'global generator of {name}, so a resumed run'):
        images(PerExample(fn=fn, field='image'))
    seeded = PerExample(fn=fn, field='image', seed_global=True)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    two = images(seeded, count=2)
    # They are restored, so nothing else in the process notices.
    assert (random.random(), np.random.random()) == expected
    # Another epoch draws other numbers; a loader that starts there draws the same ones.
    assert (two[0] != two[1]).any(axis=(1, 2, 3)).sum() > N / 2
    np.testing.assert_array_equal(images(seeded, start=1)[0], two[1])


def test_a_library_that_draws_when_it_is_imported_is_no_error() -> None:
    calls = []

    def first(image: np.ndarray) -> np.ndarray:
        calls.append(random.random() if not calls else None)
        return image

    images(PerExample(fn=first, field='image'))


def test_the_check_for_global_generators_is_over_after_the_first_example() -> None:
    calls = []

    def later(image: np.ndarray) -> np.ndarray:
        calls.append(None)
        return add_numpy_noise(image) if len(calls) > 1 else image

    # Not more: other threads may draw from these generators while training goes on.
    images(PerExample(fn=later, field='image'))


class SimilarCompose:
    """A class of another package that is called like `albumentations.Compose`."""

    def __init__(self) -> None:
        self.random = np.random.default_rng()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> SimilarCompose:
        return type(self)()

    def set_random_seed(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def __call__(self, *args: Any, force_apply: bool = False, **data: Any) -> dict[str, Any]:
        if args:
            raise KeyError('You have to pass data to augmentations as named arguments')
        # Two calls at once would mix their seeds.
        assert self.lock.acquire(blocking=False)
        first, second = (np.uint8(self.random.integers(256)) for _ in range(2))
        self.lock.release()
        return {**data, 'image': data['image'] + first + second}


class Compose(SimilarCompose):
    """What `albumentations.Compose` looks like to its caller."""


Compose.__module__ = 'albumentations.core.composition'


def invert(*, image: np.ndarray, **others: Any) -> dict[str, Any]:
    return {'image': 255 - image, **others}


@pytest.mark.parametrize('field', [None, 'image'])
def test_a_function_that_takes_only_names_gets_fields_by_name(field: str | None) -> None:
    np.testing.assert_array_equal(
        images(PerExample(invert, field=field)), 255 - images(PerExample(lambda x: x))
    )


@pytest.mark.parametrize('kind', [Compose, SimilarCompose])
@pytest.mark.parametrize('field', [None, 'image'])
def test_an_object_with_a_seed_of_its_own_is_seeded_for_each_example(
    field: str | None, kind: type[SimilarCompose]
) -> None:
    run = PerExample(fn=kind(), field=field)
    two = images(run, count=2)
    assert (two[0] != two[1]).any(axis=(1, 2, 3)).sum() > N / 2
    np.testing.assert_array_equal(images(run, start=1)[0], two[1])
    np.testing.assert_array_equal(images(run, count=2, kind=GrainLoader), two)
    batch = source().gather(np.arange(N))
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: run(batch, rng())['image'], range(16)):
            np.testing.assert_array_equal(result, two[0])


def test_worker_processes_can_unpickle_it() -> None:
    run = pickle.loads(pickle.dumps(PerExample(fn=shift, field='image')))
    np.testing.assert_array_equal(images(run), images(PerExample(fn=shift, field='image')))
