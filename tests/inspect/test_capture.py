# SPDX-License-Identifier: Apache-2.0
"""`config.capture`: intermediate values as metrics, histograms and files; the step is unchanged."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from tests.inspect.models import build, linen, nnx_model
from tests.inspect.program import computation
from tests.marks import slow_after
from tests.parallel import group
from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.inspect import statistics
from trainer.inspect.capture import Captures
from trainer.inspect.forward import Forward
from trainer.modes.grad_probe import next_step_gradients
from trainer.modules.model_view import BoundModel
from trainer.modules.rng import Keys
from trainer.trainer import Trainer

EVERYTHING = {'all': {'match': '.*', 'what': ('summary', 'histogram', 'file')}}
LAYERS = [f'layer_{k}' for k in range(4)]


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    every = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [row for row in every if any(name.startswith('capture/') for name in row)]


def bind(made: Experiment, state: Any) -> BoundModel:
    keys = Keys(seed=made.seed, mode='train', step=state.step)
    return made.model.bind(state.variables, keys)


@pytest.mark.slow
def test_captured_values_equal_those_of_the_model(tmp_path: pathlib.Path) -> None:
    """With the parameters after the step, on the batch of that step."""
    made = build(linen(), train_for='20 steps', capture={'a': {'match': 'first|last|.model.'}})
    trainer = Trainer(made, str(tmp_path))
    state = trainer.fit().state
    with trainer.batches(19, [1]) as batches:
        batch = next(iter(batches)).arrays
        prepared = made.task.prepare_batch(batch, None)
    logits = np.asarray(bind(made, state)(prepared['image']))
    row = rows(tmp_path)[-1]
    assert row['step'] == 20
    names = {'mean', 'std', 'min', 'max', 'zeros', 'nonfinite'}
    assert set(row) == {
        'step',
        *(f'capture/a/{m}/{n}' for m in ('first', 'last', '(model)') for n in names),
    }
    for module in ('last', '(model)'):
        for name in ('mean', 'std', 'min', 'max'):
            expected = getattr(logits, name)()
            assert row[f'capture/a/{module}/{name}'] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert row['capture/a/last/nonfinite'] == row['capture/a/last/zeros'] == 0


@pytest.mark.parametrize(
    ('model', 'names'),
    slow_after(1, [
        (linen(), [n for k in LAYERS for n in (f'{k}/dense', k)]),
        (nnx_model(), [n for k in range(4) for n in (f'layers/{k}/dense', f'layers/{k}')]),
        (linen(scans=True), [
            n for k in range(4)
            for n in (f'layers/layer/dense[{k}]', f'layers/layer[{k}]', f'layers/mark[{k}]')
        ]),
    ]),
    ids=['linen', 'nnx', 'scan'],
)  # fmt: skip
def test_captured_modules_have_names(model: Any, names: list[str], tmp_path: pathlib.Path) -> None:
    """Linen, NNX, and the layers of a scan one by one."""
    made = build(model, train_for='10 steps', capture={'a': {'match': 'lay.*', 'what': ('file',)}})
    Trainer(made, str(tmp_path)).fit()
    found = np.load(tmp_path / 'capture' / 'a' / '10.npz')
    assert set(names) <= set(found)
    assert not {'first', 'last', '(model)'} & set(found)
    assert all(found[name].shape == (8, 16) for name in names)
    assert not rows(tmp_path)


@pytest.mark.slow
def test_the_train_step_is_unchanged(tmp_path: pathlib.Path) -> None:
    """The compiled program and the trained parameters are the same."""
    texts, states = [], []
    for capture in ({}, EVERYTHING):
        trainer = Trainer(build(linen(), capture=capture), str(tmp_path / str(len(texts))))
        states.append(trainer.fit().state.variables)
        texts.append(computation(trainer.set_up().programs.step.executable()))
        assert trainer.set_up().programs.step.compiles == 1
    assert texts[0] == texts[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, *states))
    assert not (tmp_path / '0' / 'capture').exists()


def events(workdir: pathlib.Path) -> list[Any]:
    """Returns the events of a run."""
    found = []
    for path in sorted(workdir.glob('events*')):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], 'little')
            event = event_pb2.Event()
            event.ParseFromString(content[12 : 12 + size])
            found.append(event)
            content = content[16 + size :]
    return found


@pytest.mark.slow
def test_histograms_are_for_tensorboard(tmp_path: pathlib.Path) -> None:
    capture = {'a': {'match': 'layer_1', 'what': ('histogram', 'file'), 'rows': 32}}
    Trainer(build(linen(), capture=capture, train_for='10 steps'), str(tmp_path)).fit()
    (value,) = [v for e in events(tmp_path) for v in e.summary.value if v.HasField('histo')]
    array = np.load(tmp_path / 'capture' / 'a' / '10.npz')['layer_1']
    histogram = value.histo
    assert value.tag == 'capture/a/layer_1'
    assert (histogram.num, len(histogram.bucket)) == (array.size, 30)
    assert (histogram.min, histogram.max) == (array.min(), pytest.approx(array.max()))
    expected, _ = np.histogram(array, bins=30)
    assert np.abs(np.array(histogram.bucket) - expected).sum() <= 4  # The borders are rounded.
    assert histogram.sum == pytest.approx(array.sum(), rel=1e-4)
    assert not rows(tmp_path)


@pytest.mark.slow
def test_old_files_are_deleted(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = {'a': {'match': 'last', 'what': ('file',), 'rows': 3, 'keep': 2, 'every': '5 steps'}}
    Trainer(build(linen(), capture=capture), str(tmp_path)).fit()
    folder = tmp_path / 'capture' / 'a'
    assert sorted(path.name for path in folder.iterdir()) == ['35.npz', '40.npz']
    assert np.load(folder / '40.npz')['last'].shape == (3, 10)
    out = capsys.readouterr().out
    assert out.count(f' to {folder}, keeping the last ') == 1
    assert 'keeping the last 2 (at most ' in out


@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_sown_values_are_captured(accumulate: int, tmp_path: pathlib.Path) -> None:
    """By name, in any module."""
    made = build(
        {'target': 'tests.modules.test_intermediates:VAE'}, accumulate=accumulate,
        task={'ref': 'tests.modules.test_intermediates:reconstruction'}, train_for='10 steps',
        capture={'a': {'match': 'kl', 'what': ('summary', 'file'), 'rows': 100}},
    )  # fmt: skip
    Trainer(made, str(tmp_path)).fit()
    (row,) = rows(tmp_path)
    array = np.load(tmp_path / 'capture' / 'a' / '10.npz')['kl']
    assert array.shape == (32 // accumulate,)  # The first micro-batch.
    assert row['capture/a/kl/mean'] == pytest.approx(array.mean(), rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_rows(tmp_path: pathlib.Path) -> None:
    """A stopped and resumed run writes the rows of an uninterrupted one."""
    options = {
        'steps_per_call': 4, 'checkpoint__every': '20 steps',
        'capture': {
            'often': {'match': 'first', 'every': '7 steps'},
            'rarely': {'match': 'last', 'every': '0.5 epochs', 'what': ('summary', 'file')},
        },
    }  # fmt: skip
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    Trainer(build(linen(), **options), str(whole)).fit()
    Trainer(build(linen(), **options), str(parts)).fit(max_steps=26)
    Trainer(build(linen(), **options), str(parts)).fit()
    assert [row['step'] for row in rows(whole)] == [7, 14, 15, 21, 28, 30, 35]
    assert rows(parts) == rows(whole)
    files = [np.load(path / 'capture' / 'rarely' / '30.npz')['last'] for path in (whole, parts)]
    np.testing.assert_array_equal(*files)


@pytest.mark.slow
def test_files_of_later_steps_are_deleted(tmp_path: pathlib.Path) -> None:
    """A run that resumes at an earlier step deletes the files of later steps."""
    capture = {'a': {'match': 'last', 'what': ('file',), 'keep': 2, 'every': '5 steps'}}
    folder = tmp_path / 'capture' / 'a'
    folder.mkdir(parents=True)
    for step in (900, 905):
        np.savez(folder / f'{step}.npz', last=np.zeros(3))
    Trainer(build(linen(), capture=capture, train_for='10 steps'), str(tmp_path)).fit()
    assert sorted(path.name for path in folder.iterdir()) == ['10.npz', '5.npz']


def test_captures_that_are_not_due_are_not_measured(tmp_path: pathlib.Path) -> None:
    made = build(
        linen(),
        capture={
            'often': {'match': 'first', 'every': '5 steps'},
            'rarely': {'match': 'last', 'every': '10 steps', 'what': ('file',)},
        },
    )
    run = Trainer(made, str(tmp_path))
    state = run.init_state()
    captures = Captures(
        made.logging.captures, Forward.from_experiment(made, run.set_up().mesh), None
    )
    batch = run.set_up().programs.fields.shapes

    def names(due: list[str]) -> str:
        measure = captures._make_function([made.logging.captures[name] for name in due])
        return str(captures._forward.shapes(measure, state.replace(metrics=None), batch))

    assert 'first' in names(['often']) and 'last' not in names(['often'])
    assert 'last' in names(['often', 'rarely'])


@pytest.mark.slow
def test_on_a_mesh(tmp_path: pathlib.Path) -> None:
    """The values are those of the whole batch, however batch and parameters are sharded."""
    found = []
    for mesh, sharding in (({'data': 8}, ()), ({'data': 2, 'fsdp': 4}, 'fsdp')):
        workdir = tmp_path / str(len(found))
        made = build(
            linen(), capture=EVERYTHING, mesh=mesh, sharding=sharding, train_for='10 steps'
        )
        Trainer(made, str(workdir)).fit()
        found.append(rows(workdir)[0])
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_several_processes(tmp_path: pathlib.Path) -> None:
    """Process 0 writes the same as a single process."""
    args = (
        '--config.train_for=20steps', '--config.log.every=10steps', '--config.evals={}',
        f'--config.model={json.dumps(linen())}', f'--config.capture={json.dumps(EVERYTHING)}',
        '--config.guard={"non_finite": "stop"}',
    )  # fmt: skip
    found = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        group.train(count, workdir, *args, devices=4 // count)
        files = sorted(path.name for path in (workdir / 'capture' / 'all').iterdir())
        assert files == ['10.npz', '20.npz']
        found.append((rows(workdir), dict(np.load(workdir / 'capture' / 'all' / '20.npz'))))
    (one, arrays), (two, others) = found
    assert [row['step'] for row in two] == [10, 20]
    assert one[-1].keys() == two[-1].keys()
    for name, value in one[-1].items():
        assert value == pytest.approx(two[-1][name], rel=1e-3, abs=1e-5), name
    for name, array in arrays.items():
        np.testing.assert_allclose(array, others[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_non_finite_values_are_counted() -> None:
    x = jnp.array([1.0, jnp.nan, 3.0, jnp.inf, 0.0, 0.0])
    kept = statistics.make_measure(frozenset({'histogram'}), 0)(x)
    numbers = {name: float(value) for name, value in kept['summary'].items()}
    assert numbers['mean'] == 1.0
    assert (numbers['min'], numbers['max']) == (0.0, 3.0)
    assert numbers['zeros'] == pytest.approx(2 / 6)
    assert numbers['nonfinite'] == pytest.approx(2 / 6)
    assert kept['counts'].sum() == 4
    assert kept['counts'][0] == 2 and kept['counts'][-1] == 1


@pytest.mark.slow
def test_mistakes(caplog: pytest.LogCaptureFixture) -> None:
    def error_text(capture: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            Trainer(
                build(options.pop('model', linen()), capture={'a': capture}, **options)
            ).compile()
        return str(caught.value)

    assert 'matches no module and no sown value' in error_text({'match': 'layer'})
    assert 'such as first, layer_0/dense, layer_0, layer_1/dense' in error_text({'match': 'layer'})
    assert "config.capture.a.match: '(' is not a regular expression" in error_text({'match': '('})
    assert 'config.capture.a.rows: expected' in error_text({'match': '.*', 'rows': 0})
    off = error_text({'match': '.*', 'what': ('histogram',)}, log__tensorboard=False)
    assert 'config.log.tensorboard is off' in off
    closed = {'target': 'tests.modules.test_intermediates:Stack', 'kind': 'scan'}
    task = {'ref': f'{__name__}:square'}
    hidden = error_text({'match': 'layers/.*'}, model=closed, task=task)
    assert "without the collection 'intermediates'" in hidden
    made = build(closed, capture={'a': {'match': '.*'}}, task=task)
    with caplog.at_level(logging.WARNING, 'trainer'):
        Trainer(made).compile()
    assert 'layers/Dense_0' in caplog.text and 'not captured' in caplog.text


def square(model: Any, batch: Any) -> Any:
    return (model(batch['image'].reshape(len(batch['image']), -1)[:, :4]) ** 2).sum(-1)


@pytest.mark.slow
def test_modules_in_branches_are_not_captured(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The modules around them are captured, and a warning names those that are not."""
    made = build(
        {'target': 'tests.modules.test_intermediates:Branching', 'sows': False},
        train_for='10 steps', task={'ref': f'{__name__}:square'}, capture={'a': {'match': '.*'}},
        guard={'non_finite': 'stop'},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, 'trainer'):
        Trainer(made, str(tmp_path)).fit()
    assert 'one, two not captured: inside a branch or a loop (nn.cond' in caplog.text
    names = {name.split('/')[2] for name in rows(tmp_path)[0] if name != 'step'}
    assert names == {'last', '(model)'}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'names'),
    [
        ('Lifted', ['rnn', 'dense', 'of_nnx', 'many[0]', 'many[1]', 'last', '(model)']),
        pytest.param('Bridged', ['of_linen', 'last', '(model)'], marks=pytest.mark.slow),
    ],
)
def test_lifted_modules_and_bridges(name: str, names: list[str], tmp_path: pathlib.Path) -> None:
    made = build(
        {'target': f'tests.inspect.models:{name}'}, train_for='10 steps',
        capture={'a': {'match': '.*', 'what': ('file',)}}, guard={'non_finite': 'stop'},
    )  # fmt: skip
    trainer = Trainer(made, str(tmp_path))
    state = trainer.fit().state
    assert list(np.load(tmp_path / 'capture' / 'a' / '10.npz')) == names
    found = [each.path for each in next_step_gradients(trainer, state, ('.*',))]
    assert found == list(dict.fromkeys(name.partition('[')[0] for name in names))
