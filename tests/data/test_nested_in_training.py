# SPDX-License-Identifier: Apache-2.0
"""Nested batches in whole runs: the same numbers as for the same arrays in a flat dict."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import flax.struct
import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from tests import nested
from tests.command import CLOCK
from tests.marks import slow_except
from tests.nested import FORMS, HERE, NESTED, get_config
from tests.parallel import group
from trainer import Trainer, build
from trainer.config.errors import UserError
from trainer.modes import export
from trainer.trainer import Result

MINE = __name__


@flax.struct.dataclass
class Block:
    """What the loader of this file returns."""

    arrays: Any
    ids: Any


class OwnLoader:
    """A loader of one's own, in the order of the source; `change` changes a block."""

    change: Callable[[int, Any], Any] = staticmethod(lambda start, arrays: arrays)

    def __init__(
        self,
        *,
        form: str,
        source: Any,
        batch_size: int,
        transforms: Any,
        seed: int,
        shuffle: bool,
        remainder: str,
        repeat_batch: int | None,
    ):
        self.examples, self.steps_per_epoch = 64, Fraction(64, batch_size)
        self._form, self._size = form, batch_size

    @property
    def spec(self) -> Any:
        arrays = nested.arrange(self._form, nested.arrays())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self._size, *x.shape[1:]), x.dtype), arrays
        )

    def block(self, start: int, count: int, rows: Any = slice(None)) -> Block:
        first = np.arange(start, start + count)[:, None] * self._size
        ids = ((first + np.arange(self._size)) % 64)[:, rows]
        arrays = nested.arrange(self._form, {n: x[ids] for n, x in nested.arrays().items()})
        return Block(self.change(start, arrays), ids)


class ChangingLoader(OwnLoader):
    """Its later batches lack an array."""

    @staticmethod
    def change(start: int, arrays: Any) -> Any:
        return (
            {'inputs': {'x': arrays['inputs']['x']}, 'label': arrays['label']} if start else arrays
        )


def step(state: Any, batch: Any, ctx: Any) -> Any:
    """A step of one's own, that also replaces arrays of the batch."""
    same = batch if isinstance(batch, dict) else jax.tree.map(lambda x: x, batch)
    output = ctx.task(ctx.bind(), same)
    grads, collections, metrics = ctx.gradients(state, batch)
    state, more = ctx.update(state, grads, collections)
    return state, {**metrics, **more, 'again': ctx.loss(output)}


def score(examples: dict[str, Any]) -> dict[str, float]:
    """Checks what a score gets: the leaves that it names, and a part of the tree."""
    x, z = examples['pair']
    np.testing.assert_array_equal(x[:, 0], examples['nested/pair/0'])
    assert examples['meta']['text'][20] == 'number 20' and examples['meta']['none'] is None
    assert z.shape == (21, 4)
    return {'right': float(np.mean(examples['logits'].argmax(-1) == examples['target/label']))}


def make_config(form: str, **changes: Any) -> ml_collections.ConfigDict:
    config = get_config(form)
    for path, value in changes.items():
        node: Any = config
        *parents, last = path.split('__')
        for name in parents:
            node = node[name]
        with config.ignore_type():
            node[last] = value
    return config


def fit(form: str, workdir: pathlib.Path | None = None, **changes: Any) -> Result:
    path = None if workdir is None else str(workdir)
    return Trainer(build(make_config(form, **changes)), path).fit()


def numbers(result: Result) -> dict[str, float]:
    return {name: x for name, x in result.metrics.items() if not name.endswith(CLOCK)}


def assert_same(result: Result, expected: Result) -> None:
    """Asserts that two runs have the same metrics and the same state, to the bit."""
    assert result.status == 'finished'
    assert numbers(result) == numbers(expected)
    mine, other = (jax.tree.leaves(jax.device_get(each.state)) for each in (result, expected))
    assert len(mine) == len(other)
    for x, y in zip(mine, other, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def digests(workdir: pathlib.Path) -> tuple[str, str]:
    result = json.loads((workdir / 'result.json').read_text())
    return result['digest'], result['data_digest']


@pytest.fixture(scope='module')
def flat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, pathlib.Path]:
    """A run with the arrays in a flat dict, and its directory."""
    workdir = tmp_path_factory.mktemp('flat') / 'run'
    return fit('flat', workdir), workdir


@pytest.mark.parametrize('form', slow_except(('dict', 'tuple'), NESTED))
def test_a_tree_trains_and_evaluates_like_a_flat_dict(
    form: str, flat: tuple[Result, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Its evaluation has padding, on eight devices."""
    result = fit(form, tmp_path / 'run')
    assert_same(result, flat[0])
    assert result.metrics['eval/dev/examples'] == 21
    mine, other = (
        json.loads((each / 'result.json').read_text()) for each in (tmp_path / 'run', flat[1])
    )
    assert mine['digest'] == other['digest']
    assert mine['data_digest'] == other['data_digest']


STREAM = 'trainer.data.streaming:StreamLoader'
OPTIONS = {
    'grain': {'data__loader': dict(target='trainer.data.grain_loader:GrainLoader', task_rows=5)},
    'workers': {'data__loader': dict(target='trainer.data.grain_loader:GrainLoader', workers=1)},
    'accumulate': {'accumulate': 2},
    'fused': {'steps_per_call': 2},
    'padded epochs': {'data__remainder': 'pad', 'data__source__n': 40},
    'transforms': {'data__transforms': (dict(ref=f'{HERE}:scale_x'),)},
    'device transforms': {'data__device_transforms': (dict(ref=f'{HERE}:scale_x'),)},
    'ensemble': {'ensemble': dict(size=2)},
    'step': {'step': dict(ref=f'{MINE}:step')},
    'guard': {'guard': dict(non_finite='warn')},
}


@pytest.mark.slow
@pytest.mark.parametrize('option', OPTIONS)
def test_a_tree_is_like_a_flat_dict_with_any_option(option: str) -> None:
    expected = fit('flat', **OPTIONS[option])
    # A tuple at the top has a mask of its own.
    for form in ('mixed', 'named') if option in ('accumulate', 'workers') else ('mixed',):
        assert_same(fit(form, **OPTIONS[option]), expected)


@pytest.mark.slow
def test_streams_have_trees(tmp_path: pathlib.Path) -> None:
    def read(form: str) -> Result:
        loader = dict(target='trainer.data.streaming:StreamLoader')
        other = dict(target='trainer.data.streaming:StreamEvalLoader')
        return fit(form, data__loader=loader, evals__dev__data__loader=other)

    expected = read('flat')
    assert expected.metrics['eval/dev/examples'] == 21
    assert_same(read('tuple'), expected)
    assert_same(read('dict'), expected)


@pytest.mark.slow
def test_items_are_trees() -> None:
    def read(form: str) -> Result:
        items = dict(target=f'{HERE}:Items', form=form)
        source = dict(target='trainer.data.sources:RandomAccessSource', items=items)
        return fit(form, data__source=source)

    expected = read('flat')
    for form in ('mixed', 'named'):
        assert_same(read(form), expected)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['mixed', 'named'])
def test_a_paused_run_continues_exactly(
    form: str, flat: tuple[Result, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / 'run'
    assert Trainer(build(get_config(form)), str(workdir)).fit(max_steps=5).status == 'paused'
    assert_same(fit(form, workdir), flat[0])
    assert digests(workdir) == digests(flat[1])


@pytest.mark.slow
def test_two_processes_train_on_trees_like_on_a_flat_dict(tmp_path: pathlib.Path) -> None:
    for form in ('flat', 'mixed', 'tuple'):
        config = (f'--config={pathlib.Path(nested.__file__)}:{form}',)
        codes, _, errors = group.finish(group.start(2, tmp_path / form, config=config, devices=2))
        assert codes == [0, 0], errors
        assert digests(tmp_path / form) == digests(tmp_path / 'flat')
        result = json.loads((tmp_path / form / 'result.json').read_text())
        assert result['metrics']['eval/dev/examples'] == 21


@pytest.mark.parametrize('form', slow_except(('mixed',), FORMS))
def test_arrays_are_evaluated_and_predicted_as_trees(form: str) -> None:
    trainer = Trainer(build(get_config(form)))
    state = trainer.init_state()
    given = nested.arrays(21, 1)
    tree = nested.arrange(form, given)
    assert trainer.evaluate(state, data=tree) == trainer.evaluate(state)['dev']
    found = trainer.predict(tree, state)
    logits = nested.Net().apply({'params': state.params}, given['x'], given['z'])
    np.testing.assert_allclose(found['logits'], np.asarray(logits), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found['nested/label'], given['label'])
    np.testing.assert_array_equal(found['nested/pair/1'], given['z'][:, 0])
    if form == 'mixed':
        np.testing.assert_array_equal(found['meta/text'], given['text'])


def test_a_score_gets_fields_by_path_and_parts_of_the_tree() -> None:
    fields = ('target/label', 'pair', 'meta')
    config = make_config('mixed', evals__dev__score=dict(ref=f'{MINE}:score', fields=fields))
    trainer = Trainer(build(config))
    assert 0 <= trainer.evaluate(trainer.init_state())['dev']['right'] <= 1
    config = make_config('mixed', evals__dev__score=dict(ref=f'{MINE}:score', fields=('targets',)))
    with pytest.raises(UserError, match="no field 'targets'; they have meta/text, pair/0, pair/1"):
        Trainer(build(config)).set_up()


@pytest.mark.slow
def test_a_step_of_ones_own_sees_the_tree() -> None:
    options = {'step': dict(ref=f'{MINE}:step')}
    expected = fit('flat', **options)
    assert_same(fit('tuple', **options), expected)
    assert 'train/again' in expected.metrics


def changing_step(state: Any, batch: Any, ctx: Any) -> Any:
    """Adds a field to the batch."""
    return ctx.gradients(state, {**batch, 'more': batch['label']})


def test_a_step_of_ones_own_keeps_the_fields() -> None:
    config = make_config('dict', step=dict(ref=f'{MINE}:changing_step'), evals={})
    with pytest.raises(UserError, match=r'config\.step: the batch for the task has more, unlike'):
        Trainer(build(config)).set_up()


def reads_some(model: Any, batch: Any) -> Any:
    return model(batch['inputs']['x'], batch['inputs']['x'])[:, 0]


def test_only_the_leaves_of_dicts_that_the_task_reads_are_sent() -> None:
    task = dict(ref=f'{MINE}:reads_some')
    programs = Trainer(build(make_config('dict', task=task, evals={}))).set_up().programs
    assert programs.fields.sent == {'inputs/x'}


def test_a_loader_of_ones_own_may_have_any_pytree() -> None:
    def run(form: str) -> Result:
        loader = dict(target=f'{MINE}:OwnLoader', form=form)
        return fit(form, data__source__form='flat', data__loader=loader, evals={})

    assert_same(run('class'), run('flat'))


def test_a_batch_of_another_structure_is_refused() -> None:
    loader = dict(target=f'{MINE}:ChangingLoader', form='dict')
    with pytest.raises(UserError, match=r'config\.data.*a batch lacks inputs/z, which the first'):
        fit('dict', data__loader=loader, evals={})


def reads_text(model: Any, batch: Any) -> Any:
    return model(batch['pair'][0], batch['meta']['text'])


def reads_missing(model: Any, batch: Any) -> Any:
    return model(batch['pair'][0], batch['meta']['image'])


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (reads_text, "reads batch['meta/text'] of dtype <U9, which devices cannot store"),
        (reads_missing, "asks for batch['meta/image'], and batch['meta'] holds none: None, text"),
    ],
)
def test_errors_name_a_field_by_its_path(task: Callable[..., Any], message: str) -> None:
    config = make_config('mixed', task=dict(ref=f'{MINE}:{task.__name__}'), evals={})
    with pytest.raises(UserError, match=re.escape(message)):
        Trainer(build(config)).set_up()


@pytest.mark.parametrize('form', slow_except(('mixed',), ('mixed', 'named', 'tuple')))
def test_an_exported_function_takes_a_tree_of_plain_containers(
    form: str, tmp_path: pathlib.Path
) -> None:
    config = make_config(form, evals__dev__task=dict(target=f'{MINE}:Logits', form=form))
    trainer = Trainer(build(config))
    state = trainer.init_state()
    evaluator = trainer.set_up().evaluators['dev']
    about = export.write(evaluator, state, epath.Path(tmp_path), platforms=('cpu',))
    function = jax.export.deserialize(bytearray((tmp_path / 'model.jax_export').read_bytes()))
    given = nested.arrays(5)
    x, z = given['x'], given['z']
    tree = {'mixed': {'pair': (x, z)}, 'named': {'x': x, 'z': z}, 'tuple': ((x, z), None)}[form]
    expected = nested.Net().apply({'params': state.params}, x, z)
    np.testing.assert_allclose(function.call(tree)['logits'], np.asarray(expected), rtol=1e-5)
    names = {'mixed': ('pair/0', 'pair/1'), 'named': ('x', 'z'), 'tuple': ('0/0', '0/1')}[form]
    assert about['batch'] == dict.fromkeys(names, 'float32[rows, 4]')


class Logits(nested.Task):
    """Predicts the logits alone."""

    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        return {'logits': super().predict(model, batch)['logits']}
