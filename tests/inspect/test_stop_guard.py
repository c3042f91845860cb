# SPDX-License-Identifier: Apache-2.0
"""`config.guard`: a diverged run names the first bad step and layer."""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from tests import command
from tests.command import ROOT
from tests.inspect.models import STEP, build, linen, nnx_model
from tests.marks import slow_after
from tests.parallel import group
from trainer.config.errors import UserError
from trainer.experiment import Experiment, load_and_build
from trainer.run.failure import NonFiniteError
from trainer.trainer import Trainer

STOP: dict[str, Any] = {'non_finite': 'stop'}


def message(made: Experiment, workdir: pathlib.Path | None = None) -> str:
    with pytest.raises(NonFiniteError) as caught:
        Trainer(made, None if workdir is None else str(workdir)).fit()
    return str(caught.value)


@pytest.mark.parametrize('k', slow_after(1, [0, 2, 3]))
def test_the_layer_of_an_injected_nan_is_named(k: int) -> None:
    """A NaN in layer k is reported as layer k, with its step."""
    found = message(build(linen(bad=k), guard=STOP))
    assert 'the run has diverged; no checkpoint was saved.' in found
    assert f'Last finite step: {STEP - 1}. First non-finite step: {STEP}.' in found
    assert (
        f'The first module whose output is not finite is layer_{k}, number {2 * k + 3} of' in found
    )
    assert found.endswith('its input and its parameters were finite.')


@pytest.mark.slow
@pytest.mark.parametrize('k', [0, 2])
def test_the_layer_of_an_injected_nan_in_nnx_is_named(k: int) -> None:
    """The message names the layer by its path and index."""
    found = message(build(nnx_model(bad=k), guard=STOP))
    assert f'First non-finite step: {STEP}.' in found
    assert f'not finite is layers/{k}, number {2 * k + 3} of' in found


@pytest.mark.slow
@pytest.mark.parametrize('k', [1, 2])
def test_the_layer_of_an_injected_nan_in_a_scan_is_named(k: int) -> None:
    """Scanned layers are distinguished."""
    found = message(build(linen(bad=k, scans=True), guard=STOP))
    assert f'not finite is layers/mark[{k}]' in found


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        {'steps_per_call': 4},
        {'accumulate': 2},
        {'mesh': {'data': 2, 'fsdp': 4}, 'sharding': 'fsdp'},
        {'checkpoint__every': '15 steps'},
        {'precision': {'compute': 'bfloat16'}},
        {'ema': {'decay': 0.9}},
    ],
    ids=lambda options: '-'.join(options),
)
def test_divergence_is_found_in_every_kind_of_run(options: dict[str, Any], tmp_path: Any) -> None:
    # With two micro-batches, a layer is called twice in a step.
    made = build(linen(bad=1), guard=STOP, **options)
    found = message(made, tmp_path)
    step = math.ceil(STEP / options.get('accumulate', 1))
    assert f'First non-finite step: {step}.' in found
    assert 'not finite is layer_1' in found
    checkpoints = Trainer(build(linen(bad=1), **options), str(tmp_path)).checkpoints
    assert checkpoints is not None and not checkpoints.steps()  # None with the damage.


@pytest.mark.slow
@pytest.mark.parametrize('model', [linen, nnx_model])
def test_a_non_finite_gradient_alone(model: Any) -> None:
    found = message(build(model(bad=1, how='gradient'), guard=STOP))
    assert f'First non-finite step: {STEP}.' in found
    assert 'the gradients are not: ' in found
    bad = found.partition('the gradients are not: ')[2].partition('.')[0]
    assert 'first/bias' in bad and 'last' not in bad


@pytest.mark.slow
def test_a_non_finite_update_alone() -> None:
    made = build(
        linen(), guard=STOP,
        optimizer={'target': 'optax:sgd', 'learning_rate': {'ref': f'{__name__}:broken_rate'}},
    )  # fmt: skip
    found = message(made)
    assert 'First non-finite step: 6.' in found
    assert 'but after the update a parameter is not: first/bias, first/kernel, ' in found


@pytest.mark.slow
@pytest.mark.parametrize(('secs', 'looks'), [(0.0, list(range(1, 13))), (1e9, [1, 5, 10, 12])])
def test_when_a_state_is_checked(
    secs: float, looks: list[int], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From time to time, and before each save."""
    monkeypatch.setattr('trainer.inspect.stop_guard._MIN_SECS', secs)
    options = {'train_for': '12 steps', 'log__every': '1 steps', 'checkpoint__every': '5 steps'}
    trainer = Trainer(build(linen(), guard=STOP, **options), str(tmp_path))
    seen: list[int] = []
    sweep = trainer.set_up().programs.sweep

    def counting(state: Any) -> Any:
        seen.append(int(state.step))
        return sweep(state)

    counting.start = sweep.start  # type: ignore[attr-defined]
    vars(trainer.set_up().programs)['sweep'] = counting
    trainer.fit()
    assert [step for step in seen if step] == looks


def broken_rate(step: Any) -> Any:
    return jax.numpy.where(step == 5, jax.numpy.inf, 0.01)


class Images:
    """A source with a NaN in one image."""

    def __init__(self) -> None:
        self.spec: dict[str, Any] = {}

    def __len__(self) -> int:
        return 960

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        image = np.ones((len(indices), 28, 28, 1), np.float32)
        image[indices == 500] = np.nan
        return {'image': image, 'label': np.zeros(len(indices), np.int32)}


@pytest.mark.slow
@pytest.mark.parametrize('target', ['trainer.models.mlp:MLP', 'trainer.models.mlp_nnx:MLP'])
def test_statistics_that_a_call_makes_non_finite(target: str) -> None:
    """They are named as the cause if they were non-finite before the call, not after it."""
    model = {'target': target, 'features': (16, 10), 'batch_norm': True}
    found = message(build(model, guard=STOP, optimizer={'learning_rate': 1e30}))
    assert re.search(r'is (BatchNorm_0|norm/0), number 2 of', found)
    assert found.endswith('its input and its parameters were finite.')


@pytest.mark.slow
def test_a_non_finite_batch_is_named() -> None:
    made = build(
        linen(), guard=STOP, data__source={'target': f'{__name__}:Images'},
        data__device_transforms=(),
    )  # fmt: skip
    found = message(made)
    assert 'not finite is first, number 1 of' in found
    assert found.endswith(
        'was already non-finite (and so is image in the batch); its parameters were finite.'
    )


@pytest.mark.slow
def test_the_command_ends_with_1_and_resumes(tmp_path: pathlib.Path) -> None:
    """The last good checkpoint stays the newest."""
    args = (
        '--config.train_for=40steps', '--config.log.every=10steps', '--config.evals={}',
        '--config.checkpoint.every=10steps', f'--workdir={tmp_path}',
        '--config.guard.non_finite=stop',
        f'--config.model={json.dumps(linen(bad=1))}',
    )  # fmt: skip
    for _ in range(2):
        finished = command.run(command.MLP, *command.SMALL, *args)
        assert finished.code == 1
        assert 'not finite is layer_1' in finished.err
        assert 'Traceback' not in finished.err
        assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['10']
    assert [row['step'] for row in command.rows(tmp_path)] == [10, 20]


@pytest.mark.slow
def test_a_warning_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = Trainer(build(linen(bad=2), guard={'non_finite': 'warn'})).fit()
    assert (result.status, result.step) == ('finished', 40)
    out = capsys.readouterr().out
    assert out.count('not finite is layer_2') == 1
    assert out.index('Training continues.') > out.index('not finite is layer_2')


@pytest.mark.slow
def test_a_finite_run_is_the_same_with_and_without_a_guard() -> None:
    plain, guarded = (Trainer(build(linen(), **more)).fit() for more in ({}, {'guard': STOP}))
    assert jax.tree.all(
        jax.tree.map(np.array_equal, plain.state.variables, guarded.state.variables)
    )


@pytest.mark.slow
def test_steps_skipped_by_a_loss_scale_are_not_divergence() -> None:
    """A dynamic loss scale adjusts itself by infinite gradients."""
    made = build(linen(), guard=STOP, precision={'compute': 'float16', 'loss_scale': 2.0**40})
    result = Trainer(made).fit()
    assert result.status == 'finished'
    assert result.metrics['train/skipped_updates'] > 0


def test_mistakes() -> None:
    with pytest.raises(
        UserError, match=r"config\.guard\.non_finite: 'go' is none of 'stop', 'warn'"
    ):
        build(linen(), guard={'non_finite': 'go'})
    for key, value in (('guard', {'non_finite': 'warn'}), ('capture', {'a': {'match': '.*'}})):
        with pytest.raises(UserError, match=rf'config\.{key}: not supported for ensembles'):
            build(linen(), ensemble={'size': 2}, **{key: value})


def stream(**overrides: Any) -> Experiment:
    """Returns overrides: a stream of text, and a learning rate that is not finite in one step."""
    return load_and_build(
        str(ROOT / 'configs' / 'lm_packed.py'), train_for='12 steps', log__every='4 steps',
        evals={}, checkpoint__every='never', guard=overrides.pop('guard', STOP),
        model={'target': 'trainer.models.transformer:Transformer', 'max_length': 128,
               'width': 16, 'layers': 1, 'heads': 2},
        optimizer={'target': 'optax:adamw', 'learning_rate': {'ref': f'{__name__}:broken_rate'}},
        **overrides,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('resumes', [False, True])
def test_a_stream_is_reread(resumes: bool, tmp_path: pathlib.Path) -> None:
    made = stream()
    if resumes:
        Trainer(made, str(tmp_path)).fit(max_steps=3)
    found = message(made, tmp_path)
    assert 'Last finite step: 5. First non-finite step: 6.' in found
    assert 'but after the update a parameter is not: ' in found


@pytest.mark.slow
def test_a_stream_in_use_is_not_reread(capsys: pytest.CaptureFixture[str]) -> None:
    assert Trainer(stream(guard={'non_finite': 'warn'})).fit().step == 12
    assert 'Where it began is unknown: the data is a stream' in capsys.readouterr().out


@pytest.mark.slow
def test_several_processes(tmp_path: pathlib.Path) -> None:
    args = (
        '--config.train_for=40steps', '--config.log.every=10steps', '--config.evals={}',
        '--config.guard.non_finite=stop', f'--config.model={json.dumps(linen(bad=1))}',
    )  # fmt: skip
    codes, _, errors = group.finish(group.start(2, tmp_path, *args, devices=2))
    assert codes == [1, 1], errors
    assert f'First non-finite step: {STEP}.' in errors[0] and 'not finite is layer_1' in errors[0]
