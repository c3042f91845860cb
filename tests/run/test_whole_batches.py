# SPDX-License-Identifier: Apache-2.0
"""Runs on batches that their source collates: sequences and graphs of different sizes."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from tests import command, ragged
from tests.marks import slow_after
from tests.parallel.group import finish, start
from trainer import Trainer, build
from trainer.config.errors import UserError
from trainer.models import graphs
from trainer.modes import export
from trainer.run.failure import NonFiniteError
from trainer.trainer import Result

ONE_LENGTH = dict(target='tests.ragged:sentences', lengths=(12,))


def mesh(devices: int) -> Any:
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ('data',), devices=jax.devices()[:devices], axis_types=kinds)


def trainer(
    kind: str = 'sentences', workdir: pathlib.Path | None = None, devices: int = 1, **changes: Any
) -> Trainer:
    directory = None if workdir is None else str(workdir)
    return Trainer(build(ragged.make_config(kind, **changes)), directory, mesh=mesh(devices))


def data(kind: str = 'sentences', **options: Any) -> dict[str, Any]:
    return {'source': {'target': f'tests.ragged:{kind}'}, 'batch_size': 6, **options}


def numbers(result: Result) -> dict[str, float]:
    timed = ('_per_sec', '_secs')
    return {name: x for name, x in result.metrics.items() if not name.endswith(timed)}


@pytest.mark.slow
def test_each_shape_is_compiled_once_and_announced(caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(train_for='40 steps', data=data(batch_size=2))
    with caplog.at_level(logging.WARNING, 'trainer'):
        run.fit()
    programs = (run.set_up().programs.step, *run.set_up().evaluators['dev']._programs.values())
    assert [program.compiles for program in programs] == [3, 3]
    lines = [line for line in caplog.messages if 'compiles for another shape' in line]
    assert len(lines) == len(set(lines)) == 4
    assert 'the train step compiles for another shape of its batches (2 of at most 3)' in lines[0]
    assert 'tokens: int32[2, ' in lines[0]
    # Its compilations do not count as slow steps.
    assert run.report.time.get('compile') > programs[0].late_secs > run.report.time.get('steps')


class Normalized(ragged.GraphNet):
    """Its batch statistics may be those of padding, too."""

    @nn.compact
    def __call__(self, graph: Any, train: bool = False) -> jax.Array:
        return nn.BatchNorm(use_running_average=not train)(super().__call__(graph))


class Masked(Normalized):
    masks_padding = True


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'warns'), [('Normalized', True), ('Masked', False)])
def test_statistics_of_padding_are_warned_about(
    model: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless the model says that it leaves padding out."""
    with caplog.at_level(logging.WARNING, 'trainer'):
        trainer('molecules', model=dict(target=f'{__name__}:{model}'), train_for='1 step').fit()
    found = [line for line in caplog.messages if 'set masks_padding = True' in line]
    assert len(found) == warns


def test_more_shapes_than_announced_are_an_error() -> None:
    run = trainer(train_for='40 steps', data=data(batch_size=2))
    run.experiment.data.loader._collator.num_shapes = 2  # type: ignore[attr-defined]
    with pytest.raises(
        UserError, match=r'num_shapes=2, but a batch has one more shape: tokens: int32\[2'
    ):
        run.fit()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'batch_size'), [('molecules', 6), ('molecules', 7), ('sentences', 8)]
)
def test_the_same_numbers_on_any_number_of_devices(kind: str, batch_size: int) -> None:
    """Also where arrays do not divide evenly, and are replicated."""
    changes: dict[str, Any] = {'data': data(kind, batch_size=batch_size)}
    one, eight = (trainer(kind, devices=n, **changes).fit() for n in (1, 8))
    assert numbers(one) == pytest.approx(numbers(eight), rel=1e-4)
    assert one.metrics['eval/dev/examples'] == 21


@pytest.mark.slow
def test_a_batch_may_be_a_tuple_without_a_dict() -> None:
    """Its mask follows from the ids."""
    bare, whole = (trainer(kind, devices=8).fit() for kind in ('bare_molecules', 'molecules'))
    assert numbers(bare) == numbers(whole)


@pytest.mark.parametrize('kind', slow_after(1, ['molecules', 'sentences']))
def test_an_evaluation_counts_each_example_once(kind: str) -> None:
    """On eight devices with padding as one example at a time."""
    many = trainer(kind, devices=8)
    state = jax.device_get(many.init_state())
    whole = many.evaluate(state)['dev']
    config = ragged.make_config(kind)
    config.evals.dev.data.batch_size = 1
    alone = Trainer(build(config), mesh=mesh(1)).evaluate(state)['dev']
    assert whole['examples'] == alone['examples'] == 21
    assert dict(whole) == pytest.approx(dict(alone), rel=1e-5)


@pytest.mark.parametrize('kind', slow_after(1, ['molecules', 'sentences']))
def test_a_resumed_run_is_exact(kind: str, tmp_path: pathlib.Path) -> None:
    whole = trainer(kind, tmp_path / 'whole').fit()
    for _ in range(2):
        parts = trainer(kind, tmp_path / 'parts').fit(max_steps=6)
    assert numbers(whole) == numbers(parts)
    assert digests(tmp_path / 'whole') == digests(tmp_path / 'parts')


def digests(workdir: pathlib.Path) -> tuple[str, str]:
    """Returns those of the data and of the state."""
    result = json.loads((workdir / 'result.json').read_text())
    return result['data_digest'], result['digest']


@pytest.mark.parametrize('kind', slow_after(1, ['sentences', 'molecules']))
def test_predictions_are_of_the_examples_alone(kind: str) -> None:
    run = trainer(kind, devices=8)
    state = run.init_state()
    batches = list(run.predict('dev', state))
    numbered = np.concatenate([batch['number'] for batch in batches])
    np.testing.assert_array_equal(numbered, np.arange(21))
    assert numbered.dtype == np.int64
    again = run.predict(getattr(ragged, kind)(21, 1), state)
    for name, x in again.items():
        whole = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_allclose(x, whole, rtol=1e-5)


@pytest.mark.slow
def test_a_score_sees_all_examples_and_fields_with_a_row_for_each() -> None:
    result = Trainer(build(ragged.get_config('sentences')), mesh=mesh(8)).fit()
    assert result.metrics['eval/dev/sum'] > 0


def test_a_score_gets_no_field_without_a_row_for_each_example() -> None:
    config = ragged.get_config('molecules')
    config.evals.dev.score.fields = ('graph/nodes',)
    with pytest.raises(UserError, match=r"'graph/nodes' has the shape \[\d+, 3\] in a batch of 7"):
        Trainer(build(config), mesh=mesh(1)).set_up()


def test_fused_steps_need_one_shape() -> None:
    with pytest.raises(UserError, match=r'config.steps_per_call=3: .* may have 3'):
        trainer(steps_per_call=3).fit()


@pytest.mark.slow
def test_fused_steps_of_one_shape() -> None:
    one = data(source=ONE_LENGTH)
    fused, single = (trainer(data=one, steps_per_call=n).fit() for n in (3, 1))
    assert numbers(fused) == pytest.approx(numbers(single), rel=1e-5)


def test_micro_batches_need_an_entry_for_each_example() -> None:
    with pytest.raises(
        UserError, match=r'accumulate=2: .*graph/nodes.* does not have one entry for each'
    ):
        trainer('molecules', accumulate=2, data=data('molecules', batch_size=7)).fit()
    with pytest.raises(
        UserError, match=r'accumulate=4: .* 4 micro-batches on 1 device: it has 6 examples'
    ):
        trainer(accumulate=4).fit()


@pytest.mark.slow
def test_micro_batches_of_sequences() -> None:
    parts, whole = (trainer(accumulate=n).fit() for n in (2, 1))
    assert numbers(parts) == pytest.approx(numbers(whole), rel=1e-4)


def test_a_batch_that_does_not_divide_is_replicated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, 'trainer'):
        trainer('molecules', devices=8, data=data('molecules', batch_size=6)).compile()
    assert 'a batch has 7 examples with padding' in caplog.text
    assert 'Batch sizes such as 7 do' in caplog.text


def multiply_by_one(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A device transform that returns all fields, and computes with one that the model reads."""
    if 'graph' in batch:
        return {**batch, 'graph': batch['graph']._replace(nodes=batch['graph'].nodes * 1)}
    return {**batch, 'tokens': batch['tokens'] * 1}


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['sentences', 'molecules'])
def test_device_transforms_run_for_each_shape(kind: str) -> None:
    """Fields that the task does not read have the shape of their batch there, too."""
    changed, plain = ragged.make_config(kind), ragged.make_config(kind)
    for section in (changed.data, changed.evals.dev.data):
        section.device_transforms = (dict(ref=f'{__name__}:multiply_by_one'),)
    one, other = (Trainer(build(config), mesh=mesh(1)) for config in (changed, plain))
    first, second = one.fit(), other.fit()
    assert numbers(first) == pytest.approx(numbers(second), rel=1e-6)
    pairs = zip(one.predict('dev', first.state), other.predict('dev', second.state), strict=True)
    for mine, theirs in pairs:
        for name, x in mine.items():
            np.testing.assert_allclose(x, theirs[name], rtol=1e-5)


def test_a_value_out_of_range_names_the_field() -> None:
    def too_large(batch: Any) -> Any:
        graph = batch['graph']
        return {**batch, 'graph': graph._replace(nodes=graph.nodes.astype(np.float64) * 1e300)}

    config = ragged.make_config('molecules')
    with config.ignore_type():
        config.data.transforms = (too_large,)
    with pytest.raises(UserError, match="the field 'graph/nodes' of a batch has the value"):
        Trainer(build(config), mesh=mesh(1)).fit()


class OneGraph:
    """A ring of nodes; the label of a node is known for half of them."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        here = np.arange(10)
        label = np.int32(here % 5 < 2)
        nodes = {'x': np.eye(5, dtype=np.float32)[here % 5], 'label': label, 'known': here % 2 == 0}
        return {'nodes': nodes, 'senders': here, 'receivers': (here + 1) % 10}


class OfNodes(nn.Module):
    """Two logits for each node, from itself and the node before it."""

    @nn.compact
    def __call__(self, graph: Any) -> jax.Array:
        x = graph.nodes['x']
        received = graphs.sum_edges(graph, x[graph.senders])
        return nn.Dense(2)(jnp.concatenate([x, received], -1))


def label_nodes(model: Any, batch: Mapping[str, Any]) -> Any:
    """The loss of a graph is the mean over its nodes."""
    graph = batch['graph']
    logits, nodes = model(graph), graph.nodes
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, nodes['label'])
    right = logits.argmax(-1) == nodes['label']
    mean = graphs.mean_nodes(graph, jnp.stack([loss * nodes['known'], right], -1))
    return mean[:, 0], {'right': mean[:, 1]}


@pytest.mark.slow
def test_the_nodes_of_a_single_graph_are_classified() -> None:
    source = dict(
        target='trainer.data.graphs:GraphSource', items=dict(target=f'{__name__}:OneGraph')
    )
    run = trainer(
        'molecules',
        model=dict(target=f'{__name__}:OfNodes'),
        task=dict(ref=f'{__name__}:label_nodes'),
        data=dict(source=source, batch_size=1),
        evals={},
        optimizer=dict(target='optax:adam', learning_rate=0.3),
        train_for='30 steps',
    )
    assert run.fit().metrics['train/right'] == 1


@pytest.mark.slow
def test_a_value_that_is_not_finite_is_found() -> None:
    """Its steps are run again, on the same batches."""

    def break_one(batch: Any) -> Any:
        graph = batch['graph']
        broken = graph.nodes * np.where(batch['number'][0] == 7, np.nan, 1)
        return {**batch, 'graph': graph._replace(nodes=broken)}

    config = ragged.make_config('molecules')
    with config.ignore_type():
        config.data.transforms = (break_one,)
    with pytest.raises(NonFiniteError, match='graph/nodes in the batch'):
        Trainer(build(config), mesh=mesh(8)).fit()


@pytest.mark.slow
def test_members_of_an_ensemble_see_the_same_batches() -> None:
    changes: dict[str, Any] = {'ensemble': dict(size=2), 'data': data('molecules', batch_size=7)}
    one, eight = (trainer('molecules', devices=n, **changes).fit() for n in (1, 8))
    assert numbers(one) == pytest.approx(numbers(eight), rel=1e-4)


@pytest.mark.slow
def test_the_guard_and_captures_see_each_shape() -> None:
    changes: dict[str, Any] = {
        'guard': dict(non_finite='warn'),
        'capture': dict(dense=dict(match='Dense_0', every='1 steps')),
        'log': dict(every='1 steps', tensorboard=False),
    }
    run = trainer(train_for='20 steps', data=data(batch_size=2), **changes)
    assert run.fit().status == 'finished'


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['sentences', 'molecules'])
def test_an_exported_function_takes_one_shape(kind: str, tmp_path: pathlib.Path) -> None:
    run = trainer(kind)
    state, evaluator = run.init_state(), run.set_up().evaluators['dev']
    about = export.write(evaluator, state, epath.Path(tmp_path))
    function = jax.export.deserialize(bytearray((tmp_path / export.FUNCTION).read_bytes()))
    block = evaluator.data.block(0, 1)
    fields = {name: block.arrays[name][0] for name in about['batch']}
    assert {name: f'{x.dtype}{list(x.shape)}' for name, x in fields.items()} == about['batch']
    batch: dict[str, Any] = {}
    for name, x in fields.items():
        graph, _, part = name.rpartition('/')
        (batch.setdefault(graph, {}) if graph else batch)[part] = x
    (output,) = function.call(batch).values()
    first = next(iter(run.predict('dev', state)))
    np.testing.assert_allclose(output[:6], first['odd' if kind == 'sentences' else 'logits'], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['sentences', 'molecules'])
def test_two_processes_equal_one(kind: str, tmp_path: pathlib.Path) -> None:
    """Batches, evaluations and scores; where a batch does not divide evenly, too."""
    config = (f'--config=tests/ragged.py:{kind}', '--config.checkpoint.every=6steps')
    for count in (1, 2):
        workdir = tmp_path / str(count)
        codes, _, errors = finish(start(count, workdir, config=config, devices=4 // count))
        assert codes == [0] * count, errors
    one, two = tmp_path / '1', tmp_path / '2'
    assert command.result(one)['data_digest'] == command.result(two)['data_digest']
    mine, theirs = command.result(one)['metrics'], command.result(two)['metrics']
    assert mine['eval/dev/examples'] == theirs['eval/dev/examples'] == 21
    timed = ('_per_sec', '_secs')
    for name, x in mine.items():
        if not name.endswith(timed):
            assert theirs[name] == pytest.approx(x, rel=1e-4), name
