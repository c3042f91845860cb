# SPDX-License-Identifier: Apache-2.0
"""Fields that are not read stay on the host, and `predict` can return them unchanged."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from tests import command
from tests.evaluate import rows
from tests.evaluate.rows import HOST, Rows
from tests.parallel import group
from trainer.config.errors import UserError
from trainer.experiment import Experiment, load_and_build
from trainer.input.fingerprint import fingerprint
from trainer.modes import export
from trainer.observe.npz import write_npz
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'tests' / 'evaluate' / 'rows.py')
HERE = 'tests.evaluate.rows'
CENTRED = str([{'target': f'{HERE}:constant', 'function': 'center'}])


def build(**options: Any) -> Experiment:
    return load_and_build(CONFIG, **options)


def predict_all(trainer: Trainer, state: Any) -> dict[str, np.ndarray]:
    batches = list(trainer.predict('test', state))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def check_rows(found: dict[str, np.ndarray], names: tuple[str, ...] = HOST) -> None:
    """The fields are those of the source, in its order and in its own dtypes."""
    expected = Rows(77).gather(np.arange(77))
    for name in names:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name])


RUNS: dict[str, dict[str, Any]] = {
    'plain': {},
    'micro-batches, padded': {'accumulate': 2, 'data__remainder': 'pad'},
    'several steps a call': {'steps_per_call': 4},
    'transformed on the devices': {
        'data__device_transforms': CENTRED, 'evals__test__data__device_transforms': CENTRED,
    },
    'a step of its own': {'step': {'ref': f'{HERE}:step_by_hand'}},
    'from threads': {'data__loader': {'target': 'trainer.data.grain_loader:GrainLoader'}},
    'an ensemble': {'ensemble': {'size': 2}},
    'a weighted ensemble': {'ensemble': {'size': 2}, 'task__target': f'{HERE}:Weighted'},
    'streams': {
        'data__loader': {'target': 'trainer.data.streaming:StreamLoader'},
        'evals__test__data__loader': {'target': 'trainer.data.streaming:StreamEvalLoader'},
    },
    'captured and guarded': {
        'guard__non_finite': 'stop',
        'capture': {'all': {'match': '.*', 'every': '6 steps'}},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_a_run_sends_only_fields_that_are_read(name: str) -> None:
    trainer = Trainer(build(**RUNS[name]))
    result = trainer.fit()
    mask = {'_mask'} if 'data__remainder' in RUNS[name] else set()
    assert trainer.set_up().programs.fields.sent == {'x', 'label', *mask}
    evaluator = trainer.set_up().evaluators['test']
    assert evaluator.prediction(result.state).fields.sent == {'x', '_mask'}
    assert result.metrics['eval/test/examples'] == 77
    assert np.isfinite(result.metrics['eval/test/loss'])
    found = predict_all(trainer, result.state)
    assert found['class'].shape == (77,)
    check_rows(found)


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 8])
def test_unread_fields_are_not_arguments_of_the_program(devices: int) -> None:
    if devices == 1:
        finished = command.run(f'--config={CONFIG}', '--mode=dry_run', '--workdir=runs/none')
        assert finished.code == 0, finished.err
        return
    trainer = Trainer(build())
    with trainer.batches(0, [1, 1]) as batches:
        for batch in batches:
            assert {n: x.dtype for n, x in batch.arrays.items()} == {
                'x': 'float32',
                'label': 'int32',
            }
            assert all(isinstance(x, jax.Array) for x in batch.arrays.values())


def test_a_field_used_in_computations_is_returned_unchanged() -> None:
    trainer = Trainer(build(task__target=f'{HERE}:Computing', evals__test__every='never'))
    state = trainer.init_state()
    prediction = trainer.set_up().evaluators['test'].prediction(state)
    assert prediction.fields.sent == {'x', 'label', '_mask'}
    found = predict_all(trainer, state)
    check_rows(found, ('label',))
    np.testing.assert_array_equal(found['doubled'], 2 * found['label'])


def test_a_value_out_of_range_of_the_device_dtype_is_named() -> None:
    trainer = Trainer(build(task__target=f'{HERE}:Wrong'))
    with pytest.raises(UserError, match=rf"evals.test.data: the field 'id' of example 0.*{2**40},"):
        predict_all(trainer, trainer.init_state())


@pytest.mark.slow
def test_a_label_out_of_range_of_the_device_dtype_ends_the_run(tmp_path: pathlib.Path) -> None:
    finished = command.run(
        f'--config={CONFIG}', f'--workdir={tmp_path}', f'--config.data.source.label={2**33 + 1}'
    )
    assert finished.code == 2, finished.err
    assert "config.data: the field 'label' of example 50 has the value 8589934593" in finished.err
    assert 'Traceback' not in finished.err


def test_a_step_that_reads_all_fields() -> None:
    with pytest.raises(UserError, match=r"the function of config.step reads batch\['"):
        _ = Trainer(build(step={'ref': f'{HERE}:everything'})).set_up().programs


@pytest.mark.slow
def test_the_command_writes_unchanged_fields(tmp_path: pathlib.Path) -> None:
    args = (f'--config={CONFIG}', f'--workdir={tmp_path}')
    assert command.run(*args, '--config.train_for=2steps').code == 0
    finished = command.run(*args, '--config.train_for=2steps', '--mode=predict')
    assert finished.code == 0, finished.err
    with np.load(tmp_path / 'predictions_test_2.npz') as file:
        found = dict(file)
    check_rows(found, ('id', 'share', 'name'))
    assert found['raw'].tolist() == Rows(77).gather(np.arange(77))['raw'].tolist()


@pytest.mark.slow
def test_two_processes_predict_the_same_as_one(tmp_path: pathlib.Path) -> None:
    config = (f'--config={CONFIG}', '--config.train_for=2steps')
    for mode in ('train', 'predict'):
        running = group.start(2, tmp_path, f'--mode={mode}', config=config, devices=2)
        codes, _, errors = group.finish(running)
        assert codes == [0, 0], errors
    with np.load(tmp_path / 'predictions_test_2.npz') as file:
        found = dict(file)
    assert found['class'].shape == (77,)
    check_rows(found, ('id', 'share', 'name'))


# Prints which predictions a process gets.
PREDICT = """
import sys
from tests.evaluate.rows import get_config
from trainer import Trainer, build
from trainer.parallel import processes

port, number = sys.argv[1:]
watch = processes.join(processes.Cluster(
    coordinator=f'127.0.0.1:{port}', num_processes=2, process_id=int(number), timeout_secs=60))
trainer = Trainer(build(get_config()), verbose=False)
batches = list(trainer.predict('test', trainer.init_state()))
print('names', *batches[0], 'rows', *(len(batch['class']) for batch in batches))
watch.close()
"""


@pytest.mark.slow
def test_only_the_main_process_gets_unchanged_fields() -> None:
    port = group.free_port()
    running = [
        subprocess.Popen(
            [sys.executable, '-c', PREDICT, str(port), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(command.ROOT), 'JAX_PLATFORMS': 'cpu'},
        )
        for number in (0, 1)
    ]
    with group.kill_at_exit(running):
        codes, outputs, _ = group.finish(running)
    assert codes == [0, 0]
    first, second = (out.splitlines()[-1] for out in outputs)
    assert first == 'names class id name probability raw share rows 32 32 13'
    assert second == 'names class probability rows 32 32 13'


def test_objects_other_than_text_cannot_be_written(tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path) / 'a.npz'
    texts = np.array([['a', 'longer'], ['', 'é']], object)
    ends = np.array([b'a\0', b'b'], object)
    write_npz(path, {'texts': texts})
    with np.load(path) as file:
        np.testing.assert_array_equal(file['texts'], texts)
    for wrong in (np.array([{}, None], object), ends):
        with pytest.raises(UserError, match="'x' has Python objects"):
            write_npz(path, {'x': wrong})


def test_an_exported_function_omits_unchanged_fields(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(build())
    state = trainer.init_state()
    evaluator, axes = trainer.set_up().evaluators['test'], tuple(trainer.set_up().mesh.shape)
    about = export.write(evaluator, state, epath.Path(tmp_path), axes=axes, platforms=('cpu',))
    assert set(about['batch']) == {'x'} and set(about['outputs']) == {'class', 'probability'}
    assert 'returns these fields of the batch unchanged: id, name, raw, share' in caplog.text
    nothing = Trainer(build(task__target=f'{HERE}:OnlyIds'))
    with pytest.raises(UserError, match='predict computes nothing'):
        export.write(nothing.set_up().evaluators['test'], state, epath.Path(tmp_path), axes=axes)


def test_fingerprints_of_objects_depend_on_their_values() -> None:
    """And not on their addresses, which differ between processes."""
    a, b = (fingerprint(build(data__shuffle=False).data) for _ in range(2))
    assert a == b
    other = fingerprint(build(data__shuffle=False, data__source__seed=1).data)
    assert other['first example']['x'] != a['first example']['x']
    assert other['first example']['raw'] == a['first example']['raw']


def test_text_longer_than_that_of_the_first_example_is_not_truncated() -> None:
    """A stream pads with its first example, whose text may be the shortest."""
    loader = {'target': 'trainer.data.streaming:StreamEvalLoader'}
    trainer = Trainer(build(evals__test__data__loader=loader))
    blocks = [
        trainer.set_up().evaluators['test'].data.block(i, 1).arrays['name'][0] for i in range(3)
    ]
    assert blocks[2].tolist()[:13] == [f'number {i}' for i in range(64, 77)]
    assert set(blocks[2].tolist()[13:]) == {'number 0'}
    assert rows.FIRST == 2**40
