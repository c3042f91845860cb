# SPDX-License-Identifier: Apache-2.0
"""The Trainer from Python: events, hooks, evaluations, checkpoints and input errors."""

from __future__ import annotations

import io
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import pytest

from tests.command import CLOCK, ROOT
from tests.marks import slow_after
from trainer.checkpoint import digest
from trainer.checkpoint.manager import CheckpointError, Checkpoints, Retention
from trainer.config.errors import UserError
from trainer.experiment import Experiment, load_and_build
from trainer.hooks import Event
from trainer.trainer import Trainer

SEEN: list[tuple[str, int]] = []


def note(event: Event) -> None:
    SEEN.append((event.kind, event.step))


def losses_only(model: Any, batch: Any) -> jax.Array:
    """A plain function as a task: squared distance of the logits to the one-hot label."""
    return ((model(batch['image']) - jax.nn.one_hot(batch['label'], 10)) ** 2).sum(-1)


class Torn:
    """A source whose gather fails at a given example."""

    def __init__(self, bad: int):
        self.bad = bad
        self.spec = {}

    def __len__(self) -> int:
        return 640

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if (indices == self.bad).any():
            raise OSError(f'record {self.bad} is torn')
        return {
            'image': np.zeros((len(indices), 28, 28, 1), np.uint8),
            'label': np.zeros(len(indices), np.int32),
        }


def read_captions(model: Any, batch: Any) -> Any:
    return model(batch['image'])[:, 0] + batch['caption']


class Captioned(Torn):
    """A source with a field of text."""

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {**super().gather(indices), 'caption': np.full(len(indices), 'a digit')}


def build(**overrides: Any) -> Experiment:
    options = {
        'train_for': '50 steps',
        'data__source__limit': 640,
        'evals__test__data__source__limit': 100,
        'evals__test__data__batch_size': 64,
        'evals__test__every': '20 steps',
        'checkpoint__every': '25 steps',
        'log__every': '10 steps',
    }
    return load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), **{**options, **overrides})


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def trainer_in(workdir: pathlib.Path | None, **overrides: Any) -> Trainer:
    return Trainer(build(**overrides), None if workdir is None else str(workdir))


def test_events_and_their_order(tmp_path: pathlib.Path) -> None:
    """N steps are N updates, then a final evaluation and a final save; one compile of each."""
    SEEN.clear()
    hook = {'note': {'ref': f'{__name__}:note'}}
    trainer = trainer_in(tmp_path, hooks=hook, log__every='25 steps', evals__test__every='25 steps')
    result = trainer.fit()
    assert (result.status, result.step, int(result.state.step)) == ('finished', 50, 50)
    assert [
        ('start', 0),
        *[(kind, 25) for kind in ('log', 'eval', 'save')],
        *[(kind, 50) for kind in ('log', 'eval', 'save')],
        ('end', 50),
    ] == SEEN
    assert trainer.set_up().programs.step.compiles == 1
    assert trainer.set_up().evaluators['test'].compiles == 1
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['25', '50']
    assert [row['step'] for row in rows(tmp_path)] == [25, 25, 50, 50]


@pytest.mark.slow
def test_rows_have_the_documented_values(tmp_path: pathlib.Path) -> None:
    """Every row has the step, the speed, and the learning rate of its update."""
    schedule = {
        'target': 'optax:linear_schedule', 'init_value': 1.0, 'end_value': 0.0,
        'transition_steps': '100%',
    }  # fmt: skip
    trainer_in(tmp_path, optimizer__learning_rate=schedule).fit()
    train = [row for row in rows(tmp_path) if 'train/loss' in row]
    assert [row['step'] for row in train] == [10, 20, 30, 40, 50]
    assert [row['train/learning_rate'] for row in train] == pytest.approx(
        [1 - (step - 1) / 50 for step in (10, 20, 30, 40, 50)], abs=1e-6
    )
    assert set(train[0]) == {
        'step', 'train/loss', 'train/accuracy', 'train/learning_rate', 'train/grad_norm',
        'train/param_norm', 'train/update_norm', 'train/steps_per_sec', 'train/examples_per_sec',
        'train/data_wait_secs',
    }  # fmt: skip
    assert 0 < train[0]['train/data_wait_secs'] < 1 / train[0]['train/steps_per_sec']
    evaluated = [row for row in rows(tmp_path) if 'eval/test/accuracy' in row]
    assert [(row['step'], row['eval/test/examples']) for row in evaluated] == [
        (20, 100), (40, 100), (50, 100),
    ]  # fmt: skip


@pytest.mark.slow
def test_in_a_notebook(tmp_path: pathlib.Path) -> None:
    """Pauses and continues, evaluates and predicts; without a work directory it writes nothing."""
    trainer = trainer_in(tmp_path / 'run')
    assert trainer.fit(max_steps=30).status == 'paused'
    first = trainer.evaluate()['test']
    assert first['examples'] == 100
    predicted = np.concatenate([batch['class'] for batch in trainer.predict('test')])
    assert predicted.shape == (100,)
    labels = trainer.set_up().evaluators['test'].data.block(0, 2)
    real = labels.arrays['label'][labels.arrays['_mask']]
    assert (predicted == real).mean() == pytest.approx(first['accuracy'])
    traceless = trainer_in(None).fit()
    assert traceless.step == 50
    with pytest.raises(UserError, match='no work directory'):
        trainer_in(None).restore()


@pytest.mark.slow
def test_a_plain_function_is_a_task() -> None:
    result = trainer_in(None, task={'ref': f'{__name__}:losses_only'}).fit()
    assert result.metrics['train/loss'] < 1.0
    assert result.metrics['eval/test/examples'] == 100


@pytest.mark.slow
def test_an_ema_evaluation_uses_the_average() -> None:
    common = {'ema__decay': 0.9999, 'train_for': '20 steps'}
    averaged = trainer_in(None, **common, evals__test__ema=True).fit().metrics
    plain = trainer_in(None, **common).fit().metrics
    # Twenty steps hardly move an average of that decay from the first parameters.
    assert averaged['eval/test/loss'] > 2.2
    assert plain['eval/test/loss'] < 1.9


@pytest.mark.parametrize('remainder', slow_after(1, ['carry', 'pad', 'drop']))
def test_fused_steps_equal_single_steps(tmp_path: pathlib.Path, remainder: str) -> None:
    """Events run at their exact steps although these are no multiples of 7; the state is equal."""
    ends = []
    for calls in (1, 7):
        workdir = tmp_path / str(calls)
        options = {'data__remainder': remainder, 'data__source__limit': 100, 'mesh': {'data': -1}}
        trainer = trainer_in(workdir, steps_per_call=calls, **options)
        result = trainer.fit()
        ends.append((json.loads((workdir / 'result.json').read_text()), rows(workdir)))
        assert result.step == 50
    (one, one_rows), (seven, seven_rows) = ends
    assert one['data_digest'] == seven['data_digest']
    assert [row['step'] for row in one_rows] == [row['step'] for row in seven_rows]
    for a, b in zip(one_rows, seven_rows, strict=True):
        for name in a:
            if not name.endswith(CLOCK):
                assert a[name] == pytest.approx(b[name], rel=1e-4), name


@pytest.mark.slow
def test_overfits_one_batch() -> None:
    metrics = trainer_in(
        None, data__repeat_batch=1, train_for='300 steps', optimizer__learning_rate=0.1
    ).fit().metrics  # fmt: skip
    assert metrics['train/accuracy'] == 1.0
    assert metrics['train/loss'] < 0.01


@pytest.mark.slow
def test_an_error_of_the_source_keeps_its_traceback() -> None:
    trainer = trainer_in(None, data__source={'target': f'{__name__}:Torn', 'bad': 333})
    with pytest.raises(OSError, match='record 333 is torn') as error:
        trainer.fit()
    assert any(frame.name == 'gather' for frame in error.traceback)


@pytest.mark.slow
def test_a_field_of_text_is_named() -> None:
    """Only if something reads it."""
    captioned = {'target': f'{__name__}:Captioned', 'bad': -1}
    reading = {'ref': f'{__name__}:read_captions'}
    says = r"config.data: the task reads batch.'caption'. of dtype <U7.*'image', 'label'"
    with pytest.raises(UserError, match=says):
        trainer_in(None, data__source=captioned, task=reading).fit()
    split = {'evals__test__data__source': captioned}
    with pytest.raises(UserError, match=r"config.evals.test: .*'caption'. of dtype <U7"):
        trainer_in(None, **split, evals__test__task=reading).fit()
    trainer = trainer_in(None, data__source=captioned, **split)
    assert trainer.fit().status == 'finished'
    assert trainer.set_up().programs.fields.sent == {'image', 'label'}


# ---- checkpoints -------------------------------------------------------------------------------


def test_retention_keeps_the_last_the_best_and_every_nth(tmp_path: pathlib.Path) -> None:
    """The newest are kept although an older one is best, and NaN is never best."""
    trainer = trainer_in(tmp_path, checkpoint__keep_every='40 steps')
    retention = Retention(
        keep_last=2,
        keep_every=trainer.experiment.saving.retention.keep_every,
        best_metric='eval/test/accuracy',
    )
    checkpoints = Checkpoints(tmp_path / 'c', retention)
    state = {'x': jax.numpy.arange(3.0)}
    scores = {10: 0.5, 20: 0.9, 30: float('nan'), 40: 0.8, 50: 0.7, 60: 0.6, 70: float('nan')}
    for step, score in scores.items():
        meta = {'metrics': {'eval/test/accuracy': score}, 'evaluated': ['test']}
        checkpoints.save(step, state, meta)
    checkpoints.close()
    assert checkpoints.steps() == [20, 40, 60, 70]
    assert checkpoints.best() == 20
    assert checkpoints.latest() == 70


def test_round_trip_on_another_mesh_and_every_kind_of_leaf(tmp_path: pathlib.Path) -> None:
    """Typed keys, half precision, integers, scalars; 8 devices to 1, digest equal."""
    eight = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    rows_of = jax.sharding.NamedSharding(eight, jax.sharding.PartitionSpec('data'))
    state = {
        'f32': jax.device_put(np.random.default_rng(0).normal(size=(16, 3)).astype('f4'), rows_of),
        'bf16': jax.numpy.arange(5, dtype='bfloat16'),
        'int': jax.numpy.int32(-7),
        'bool': jax.numpy.array([True, False]),
        'u8': jax.numpy.arange(9, dtype='uint8'),
        'key': jax.random.key(7),
    }
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(3, state, {})
    checkpoints.wait()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
    restored = checkpoints.restore(3, abstract)
    keys = restored.pop('key'), state.pop('key')
    assert keys[0].dtype == keys[1].dtype
    np.testing.assert_array_equal(*map(jax.random.key_data, keys))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert restored['f32'].sharding == one
    restored['key'], state['key'] = keys
    assert (
        checkpoints.digest(restored) == checkpoints.digest(state) == checkpoints.meta(3)['digest']
    )


def test_the_digest_detects_every_change() -> None:
    state = {'a': jax.numpy.arange(6.0).reshape(2, 3), 'b': jax.numpy.zeros(4)}

    def digest_of(tree: Any) -> str:
        return digest.combine(tree, np.asarray(digest.leaf_sums(tree)))

    base = digest_of(state)
    assert digest_of({'a': state['a'].at[1, 1].add(1e-6), 'b': state['b']}) != base
    assert digest_of({'a': state['a'][::-1], 'b': state['b']}) != base
    assert digest_of({'a': state['a'].T.reshape(2, 3), 'b': state['b']}) != base
    assert digest_of({'a': state['a'], 'c': state['b']}) != base
    assert digest_of({'a': state['a'], 'b': state['b'].astype('bfloat16')}) != base
    assert digest_of({'a': state['a'], 'b': -state['b']}) != base


def test_the_digest_is_the_same_in_numpy_and_on_the_devices() -> None:
    rng = np.random.default_rng(0)
    state = {
        'f32': rng.normal(size=(300, 301)).astype('f4'),
        'c64': rng.normal(size=(5, 3)).astype('c8'),
        'bool': rng.integers(0, 2, 7).astype(bool),
        'i8': rng.integers(-9, 9, (2, 3, 4)).astype('i1'),
        'bf16': jax.numpy.asarray(rng.normal(size=9), 'bfloat16'),
        'none': np.zeros((0, 3), 'f4'),
        'scalar': np.float32(3),
    }
    on_devices = np.asarray(jax.jit(digest.leaf_sums)(state))
    np.testing.assert_array_equal(digest.host_sums(state), on_devices)


def test_a_flipped_bit_is_detected(tmp_path: pathlib.Path) -> None:
    """Orbax alone restores it without an error."""
    checkpoints = Checkpoints(tmp_path, Retention())
    state = {'x': jax.numpy.array(np.random.default_rng(0).integers(0, 2**31, 5000, np.int32))}
    checkpoints.save(1, state, {})
    checkpoints.close()
    files = [p for p in (tmp_path / '1').rglob('*') if p.is_file() and p.stat().st_size > 10_000]
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(bytes(content))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with pytest.raises(CheckpointError, match='is damaged'):
        Checkpoints(tmp_path, Retention()).restore(1, abstract)


def test_a_checkpoint_without_its_commit_file_is_ignored(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, Retention())
    for step in (1, 2):
        checkpoints.save(step, {'x': jax.numpy.zeros(3)}, {})
    checkpoints.close()
    (tmp_path / '2' / 'commit_success.txt').unlink()
    (tmp_path / '3').mkdir()
    (tmp_path / 'notes.txt').write_text('')
    assert Checkpoints(tmp_path, Retention()).steps() == [1]


def raise_after_save(event: Event) -> None:
    if event.kind == 'save' and event.step == 25:
        raise RuntimeError('the hook failed')


@pytest.mark.slow
def test_a_save_in_progress_survives_an_error_of_the_run(tmp_path: pathlib.Path) -> None:
    trainer = trainer_in(tmp_path, hooks={'bad': {'ref': f'{__name__}:raise_after_save'}})
    with pytest.raises(RuntimeError, match='the hook failed'):
        trainer.fit()
    assert Checkpoints(tmp_path / 'checkpoints', Retention()).steps() == [25]
    again = trainer_in(tmp_path)
    assert again.fit().status == 'finished'


@pytest.mark.slow
def test_only_an_evaluated_step_can_be_best(tmp_path: pathlib.Path) -> None:
    """Saves every 10 steps, evaluations every 20: step 30 must not inherit the score of 20."""
    trainer = trainer_in(
        tmp_path, checkpoint__every='10 steps', checkpoint__keep_last=1,
        checkpoint__best={'metric': 'eval/test/loss', 'mode': 'max'},
    )  # fmt: skip
    trainer.fit()
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.best() == 20
    assert trainer.checkpoints.steps() == [20, 50]


@pytest.mark.slow
def test_a_run_shorter_than_its_log_interval_has_a_row(tmp_path: pathlib.Path) -> None:
    trainer_in(tmp_path, log__every='1000 steps', evals__test__every='never').fit()
    train = [row for row in rows(tmp_path) if 'train/loss' in row]
    assert [row['step'] for row in train] == [50]


# ---- the screen --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_on_a_terminal() -> None:
    from trainer.observe.progress import Progress

    terminal = Terminal()
    progress = Progress(100, terminal)
    progress.tick(1)
    row = {'train/loss': 0.5, 'train/learning_rate': 0.01, 'train/steps_per_sec': 10.0}
    progress.update(50, {**row, 'train/examples_per_sec': 320.0})
    time.sleep(0.25)
    progress.tick(50)
    progress.message('saved')
    text = terminal.getvalue()
    assert text.startswith('\r\x1b[Kstep 1/100 (1%)')
    assert 'step 50/100 (50%)  loss 0.5000  lr 0.01  320 examples/s  100 ms/step  ETA 5.0 s' in text
    assert text.endswith('\r\x1b[Ksaved\n')
