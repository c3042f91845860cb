# SPDX-License-Identifier: Apache-2.0
"""Transform objects of Grain, in `transforms` and as stages of a stream."""

from __future__ import annotations

from typing import Any

import grain
import grain.python
import numpy as np
import pytest

from trainer.data.grain_loader import GrainLoader
from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.sources import ArraySource
from trainer.data.streaming import StreamEvalLoader, StreamLoader
from trainer.data.transforms import ToFloat

N = 24


class Doubled(grain.transforms.Map):
    def map(self, element: Any) -> Any:
        return {**element, 'x': element['x'] * 2}


class Noise(grain.transforms.RandomMap):
    # Its second parameter may have any name.
    def random_map(self, element: Any, generator: np.random.Generator) -> Any:
        return {**element, 'noise': generator.random()}


class OldNoise(grain.python.RandomMapTransform):
    """A base class by its older name, and an object that can be called."""

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        return {**element, 'noise': rng.random()}

    def __call__(self, element: Any) -> Any:
        raise AssertionError('a transform of Grain is called by its method')


class Numbered(grain.transforms.MapWithIndex):
    def map_with_index(self, index: int, element: Any) -> Any:
        return {**element, 'index': np.int64(index)}


class Even(grain.transforms.Filter):
    def filter(self, element: Any) -> bool:
        return element['x'] % 2 == 0


class Twice(grain.experimental.FlatMapTransform):
    def flat_map(self, element: Any) -> Any:
        return [element, {**element, 'x': -element['x']}]


def source() -> ArraySource:
    return ArraySource({'x': np.arange(N)})


def test_they_are_called_with_one_example_at_a_time() -> None:
    transforms = (Doubled(), ToFloat(key='x', scale=0.5), Numbered(), Noise())
    loader = TrainLoader(source=source(), batch_size=8, transforms=transforms)
    whole = loader.block(0, 6).arrays
    np.testing.assert_array_equal(whole['x'], whole['index'])
    # Of each epoch and example another number, wherever the run starts, and in any loader.
    assert len(np.unique(whole['noise'])) == 2 * N
    np.testing.assert_array_equal(loader.block(4, 1).arrays['noise'][0], whole['noise'][4])
    threaded = GrainLoader(source=source(), batch_size=8, transforms=transforms, task_rows=3)
    np.testing.assert_array_equal(threaded.block(0, 6).arrays['noise'], whole['noise'])
    threaded.close()
    evaluated = EvalLoader(source=source(), batch_size=10, transforms=transforms).block(0, 3)
    assert evaluated.arrays['x'].ravel()[:N].tolist() == list(range(N))


def test_an_older_name_of_a_base_class() -> None:
    noise = [
        TrainLoader(source=source(), batch_size=8, transforms=(t,)).block(0, 1).arrays['noise']
        for t in (Noise(), OldNoise())
    ]
    np.testing.assert_array_equal(*noise)


@pytest.mark.parametrize('kind', [TrainLoader, EvalLoader, GrainLoader, StreamLoader])
@pytest.mark.parametrize(('wrong', 'name'), [(Even(), 'Filter'), (Twice(), 'FlatMap')])
def test_another_number_of_examples_is_a_stage(kind: Any, wrong: Any, name: str) -> None:
    message = rf'transforms\[1\]: .* is a {name} of Grain.*put it in config.data.loader.stages'
    with pytest.raises(ValueError, match=message):
        kind(source=source(), batch_size=4, transforms=(Doubled(), wrong))


def key_wanted(batch: dict, key: Any) -> dict:
    return batch


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (3, 'expected a function of a batch, or a Map or RandomMap of Grain; got 3'),
        (Doubled, 'expected a function of a batch.*got <class .*Doubled'),
        (grain.transforms.Batch(4), r'expected a function of a batch.*got Batch\('),
        (key_wanted, 'needs a JAX key.*move it to device_transforms'),
    ],
)
def test_other_objects_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainLoader(source=source(), batch_size=4, transforms=(wrong,))


STAGES = (Even(), Twice(), Doubled(), Noise())


def test_they_are_stages_of_a_stream() -> None:
    loader = StreamLoader(source=source(), batch_size=N, stages=STAGES, shuffle=False)
    arrays = loader.block(0, 2).arrays
    expected = np.stack([np.arange(0, 2 * N, 4), -np.arange(0, 2 * N, 4)], 1).ravel()
    np.testing.assert_array_equal(arrays['x'], [expected, expected])
    # The second pass draws other numbers than the first one.
    assert len(np.unique(arrays['noise'])) == 2 * N
    loader.close()
    evaluated = StreamEvalLoader(source=source(), batch_size=N, stages=STAGES)
    np.testing.assert_array_equal(evaluated.block(0, 1).arrays['x'][0], expected)
    evaluated.close()


def test_a_stream_with_random_stages_resumes_exactly() -> None:
    def new() -> StreamLoader:
        return StreamLoader(source=source(), batch_size=5, stages=STAGES, seed=1)

    loader = new()
    whole = loader.block(0, 8)
    loader.close()
    assert len(np.unique(whole.arrays['noise'])) == whole.arrays['noise'].size
    for step in (1, 3, 6):
        resumed = new()
        assert whole.states is not None
        resumed.restore(step, whole.states[step - 1])
        np.testing.assert_array_equal(
            resumed.block(step, 1).arrays['noise'][0], whole.arrays['noise'][step]
        )
        resumed.close()


def test_readers_and_seeds_draw_other_numbers() -> None:
    def noise(rows: slice, seed: int = 0) -> np.ndarray:
        loader = StreamLoader(source=source(), batch_size=8, stages=(Noise(),), seed=seed)
        found = loader.block(0, 2, rows).arrays['noise']
        loader.close()
        return found

    readers = [noise(slice(0, 4)), noise(slice(4, 8))]
    assert len(np.unique(readers)) == 16
    assert not np.isin(noise(slice(0, 4), seed=1), readers).any()


def test_an_object_that_is_no_stage_is_refused() -> None:
    loader = StreamLoader(source=source(), batch_size=4, stages=(3,))
    with pytest.raises(TypeError, match=r'stages\[0\] = 3: expected a function.*Filter or FlatMap'):
        loader.block(0, 1)
