# SPDX-License-Identifier: Apache-2.0
"""Completed steps are saved whatever ends a run; Ctrl-C in a notebook is not an error."""

from __future__ import annotations

import json
import pathlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import clu.metrics
import flax.struct
import jax
import numpy as np
import pytest

from tests import small
from tests.command import CLOCK
from trainer.config.errors import UserError, full_text
from trainer.hooks import Event
from trainer.run.failure import NonFiniteError
from trainer.run.result import Result
from trainer.tasks import Classification
from trainer.tasks.metrics import WeightedMean
from trainer.trainer import Trainer

Hook = Callable[[Event], None]

# The faults to raise, while set.
FAULTS: set[str] = set()


@pytest.fixture(autouse=True)
def no_faults() -> None:
    FAULTS.clear()


def flaky_transform(batch: dict[str, Any]) -> dict[str, Any]:
    """Raises in its second call: the first one is made at the start of a run."""
    if 'evaluation' in FAULTS and 'begun' in FAULTS:
        raise OSError('the storage is gone')
    FAULTS.add('begun')
    return batch


class Flaky:
    """A source that fails from some example on."""

    def __init__(self) -> None:
        self.spec: dict[str, Any] = {}
        self._read = 0

    def __len__(self) -> int:
        return 640

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self._read += len(indices)
        height = 28
        if self._read > 400:
            if 'source' in FAULTS:
                raise OSError('the rest is torn')
            height = 27 if 'shape' in FAULTS else 28
        image = np.broadcast_to(indices[:, None, None, None] % 251, (len(indices), height, 28, 1))
        return {'image': image.astype(np.uint8), 'label': (indices % 10).astype(np.int32)}


@flax.struct.dataclass
class Fragile(WeightedMean):
    """A metric that can be computed on zeros but not on data."""

    def compute(self) -> Any:
        if 'metric' in FAULTS and self.weight > 0:
            raise ValueError('no such metric')
        return super().compute()

    @classmethod
    def from_model_output(cls, *, loss: Any, weights: Any, **_: Any) -> Any:
        mean = WeightedMean.from_model_output(loss, weights)
        return cls(total=mean.total, weight=mean.weight)


class Measuring(Classification):
    metrics = clu.metrics.Collection.create(fragile=Fragile)  # type: ignore[assignment]


def failing_task(model: Any, batch: Any) -> Any:
    """Raises in a step if the fault is enabled."""

    def check(label: np.ndarray) -> np.ndarray:
        if 'step' in FAULTS:
            raise ValueError('the step failed')
        return label

    label = jax.pure_callback(
        check, jax.ShapeDtypeStruct(batch['label'].shape, np.int32), batch['label']
    )
    return ((model(batch['image']) - jax.nn.one_hot(label, 10)) ** 2).sum(-1)


def trainer_in(
    workdir: pathlib.Path | None, hook: Hook | None = None, *, devices: int = 1, **overrides: Any
) -> Trainer:
    # On one CPU device the loop itself reads the data; on several a thread does.
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ('data',), kind, devices=jax.devices()[:devices])
    return small.trainer_in(workdir, mesh=mesh, hook=hook, **overrides)


def raising_hook(error: BaseException, kind: str, step: int) -> Hook:
    """Returns a hook that raises once."""
    errors = [error]

    def hook(event: Event) -> None:
        if (event.kind, event.step) == (kind, step) and errors:
            raise errors.pop()

    return hook


def interrupting(kind: str, step: int, presses: int = 1) -> Hook:
    def hook(event: Event) -> None:
        if (event.kind, event.step) == (kind, step):
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    return hook


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{n: x for n, x in row.items() if not n.endswith(CLOCK)} for row in found]


def ending(workdir: pathlib.Path) -> tuple[Any, ...]:
    result = json.loads((workdir / 'result.json').read_text())
    return result['status'], result['digest'], result['data_digest'], rows(workdir)


def meta(trainer: Trainer, step: int) -> dict[str, Any]:
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.latest() == step
    return trainer.checkpoints.meta(step)


def whole(tmp_path: pathlib.Path, **overrides: Any) -> tuple[Any, ...]:
    trainer_in(tmp_path / 'whole', **overrides).fit()
    return ending(tmp_path / 'whole')


@pytest.fixture(scope='module')
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return whole(tmp_path_factory.mktemp('undisturbed'))


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_evaluation_loses_no_step(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transform = {'evals__test__data__transforms': ({'ref': f'{__name__}:flaky_transform'},)}
    trainer = trainer_in(tmp_path / 'run', **transform)
    FAULTS.add('evaluation')
    with pytest.raises(OSError, match='the storage is gone'):
        trainer.fit()
    assert 'Saved step 20 before exiting.' in capsys.readouterr().out
    assert meta(trainer, 20)['evaluated'] == []
    # It is still gone: nothing more is lost, and nothing is saved twice.
    with pytest.raises(OSError, match='the storage is gone'):
        trainer_in(tmp_path / 'run', **transform).fit()
    assert 'Saved' not in capsys.readouterr().out
    FAULTS.clear()
    trainer_in(tmp_path / 'run', **transform).fit()
    assert ending(tmp_path / 'run') == whole(tmp_path, **transform)


@pytest.mark.slow
@pytest.mark.parametrize('where', ['task', 'evals__test__task'])
def test_a_failing_metric_loses_no_step(tmp_path: pathlib.Path, where: str) -> None:
    options = {where: {'target': f'{__name__}:Measuring'}, 'evals__test__every': '10 steps'}
    trainer = trainer_in(tmp_path, **options)
    FAULTS.add('metric')
    with pytest.raises(ValueError, match='no such metric') as error:
        trainer.fit()
    assert "Raised while computing the metric 'fragile'" in error.value.__notes__
    # The row of a step may be fetched while later steps run.
    assert trainer.checkpoints is not None
    latest = trainer.checkpoints.latest()
    assert latest is not None and latest >= 10
    assert 'test' not in meta(trainer, latest)['evaluated']
    FAULTS.clear()
    assert trainer.fit().status == 'finished'


@pytest.mark.slow
def test_a_batch_of_a_wrong_shape_loses_no_step(tmp_path: pathlib.Path) -> None:
    """No step accepts such a batch, so none has consumed it."""
    trainer = trainer_in(tmp_path, data__source={'target': f'{__name__}:Flaky'}, evals={})
    FAULTS.add('shape')
    with pytest.raises(Exception, match='shape'):
        trainer.fit()
    assert trainer.checkpoints is not None
    latest = trainer.checkpoints.latest()
    assert latest is not None and 0 < latest < 20
    FAULTS.clear()
    result = trainer.fit(max_steps=1)
    assert int(result.state.step) == latest + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ('error', 'kind', 'step', 'evaluated'),
    [
        (RuntimeError('no'), 'log', 40, []),
        (UserError('no'), 'eval', 40, ['test']),
        (SystemExit(3), 'eval', 50, ['test']),
    ],
)
def test_a_failing_hook_loses_no_step(
    tmp_path: pathlib.Path,
    uninterrupted_run: tuple[Any, ...],
    error: BaseException,
    kind: str,
    step: int,
    evaluated: list[str],
) -> None:
    trainer = trainer_in(tmp_path, raising_hook(error, kind, step))
    with pytest.raises(type(error)):
        trainer.fit()
    assert meta(trainer, step)['evaluated'] == evaluated
    # The same trainer can resume, too.
    assert trainer.fit().status == 'finished'
    assert ending(tmp_path) == uninterrupted_run


@pytest.mark.slow
@pytest.mark.parametrize(('calls', 'devices'), [(1, 1), (4, 8)])
def test_a_failing_source_loses_no_step(tmp_path: pathlib.Path, calls: int, devices: int) -> None:
    source: dict[str, Any] = {'data__source': {'target': f'{__name__}:Flaky'}}
    source.update(steps_per_call=calls, devices=devices)
    trainer = trainer_in(tmp_path / 'run', **source)
    FAULTS.add('source')
    with pytest.raises(OSError, match='the rest is torn'):
        trainer.fit()
    assert trainer.checkpoints is not None
    latest = trainer.checkpoints.latest()
    assert latest is not None and 0 < latest < 20
    FAULTS.clear()
    trainer.fit()
    assert ending(tmp_path / 'run') == whole(tmp_path, **source)


@pytest.mark.slow
def test_without_a_work_directory_the_next_call_continues() -> None:
    trainer = trainer_in(None, raising_hook(RuntimeError('no'), 'log', 20))
    with pytest.raises(RuntimeError):
        trainer.fit()
    first = trainer.fit(max_steps=1)
    assert first.step == 21
    assert 'eval/test/loss' in first.metrics  # Which was due at step 20.
    rest, once = trainer.fit(), trainer_in(None).fit()
    jax.tree.map(np.testing.assert_array_equal, rest.state.params, once.state.params)


@pytest.mark.slow
def test_a_failed_start_keeps_the_state_in_memory() -> None:
    trainer = trainer_in(None, raising_hook(RuntimeError('no'), 'start', 20))
    trainer.fit(max_steps=20)
    with pytest.raises(RuntimeError):
        trainer.fit()
    assert trainer.fit(max_steps=1).step == 21


@pytest.mark.slow
def test_a_failing_save_is_reported_with_the_first_error(tmp_path: pathlib.Path) -> None:
    """Both are reported, even for an error that is printed without a traceback."""

    def hook(event: Event) -> None:
        if event.kind == 'log':
            (tmp_path / 'run' / 'checkpoints').write_text('in the way')
            raise UserError('the hook does not like it')

    trainer = trainer_in(tmp_path / 'run', hook)
    with pytest.raises(UserError, match='the hook does not like it') as error:
        trainer.fit()
    text = full_text(error.value)
    assert text.startswith('the hook does not like it\nThe state of step 10 could not be saved')
    assert 'checkpoints' in text


def test_the_state_of_a_failed_step_is_not_saved(tmp_path: pathlib.Path) -> None:
    def hook(event: Event) -> None:
        if (event.kind, event.step) == ('log', 20):
            FAULTS.add('step')

    trainer = trainer_in(
        tmp_path, hook, task={'ref': f'{__name__}:failing_task'}, evals={},
        checkpoint__every='10 steps',
    )  # fmt: skip
    with pytest.raises(Exception, match='the step failed'):
        trainer.fit()
    meta(trainer, 20)


@pytest.mark.slow
def test_a_state_refused_by_the_guard_is_not_saved(tmp_path: pathlib.Path) -> None:
    trainer = trainer_in(
        tmp_path, optimizer__learning_rate=1e38, evals={}, guard__non_finite='stop'
    )
    with pytest.raises(NonFiniteError):
        trainer.fit()
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.steps() == []


# ---- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('calls', [1, 7])
def test_an_interrupt_ends_fit_and_the_next_call_continues(
    tmp_path: pathlib.Path, uninterrupted_run: tuple[Any, ...], calls: int
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    trainer = trainer_in(tmp_path, interrupting('log', 30), steps_per_call=calls)
    first = trainer.fit()
    assert (first.status, first.step, int(first.state.step)) == ('interrupted', 30, 30)
    assert signal.getsignal(signal.SIGINT) is handler
    assert json.loads((tmp_path / 'result.json').read_text())['status'] == 'interrupted'
    meta(trainer, 30)
    second = trainer.fit()
    assert (second.status, second.step) == ('finished', 50)
    assert ending(tmp_path)[2] == uninterrupted_run[2]
    if calls == 1:  # Fused steps differ in the last bits.
        assert ending(tmp_path) == uninterrupted_run


@pytest.mark.slow
def test_an_interrupt_without_a_work_directory() -> None:
    trainer = trainer_in(None, interrupting('log', 20))
    first = trainer.fit()
    # Before the evaluation due there, which the next call runs.
    assert (first.status, first.step, 'eval/test/loss' in first.metrics) == (
        'interrupted', 20, False,
    )  # fmt: skip
    second = trainer.fit(max_steps=5)
    assert (second.status, second.step, 'eval/test/loss' in second.metrics) == (
        'paused', 25, True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_second_interrupt_raises_at_once(tmp_path: pathlib.Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    trainer = trainer_in(tmp_path, interrupting('log', 30, presses=2))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.latest() is None
    trainer = trainer_in(None, interrupting('log', 30, presses=2))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.fit(max_steps=1).step == 31


@pytest.mark.slow
def test_a_signal_handler_of_the_caller_is_kept(tmp_path: pathlib.Path) -> None:
    """An exception that it raises is an error like any other."""
    seen = []

    def mine(number: int, frame: Any) -> None:
        seen.append(signal.getsignal(signal.SIGINT))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, mine)
    try:
        trainer = trainer_in(tmp_path, interrupting('log', 30))
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [mine]
    meta(trainer, 30)


@pytest.mark.slow
def test_in_another_thread_no_signal_is_handled() -> None:
    handlers, results = [], []

    def note(event: Event) -> None:
        handlers.append(signal.getsignal(signal.SIGINT))

    trainer = trainer_in(None, note)

    def fit() -> None:
        results.append(trainer.fit(max_steps=10))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert isinstance(results[0], Result)
    assert set(handlers) == {before}


def test_an_interrupt_before_the_first_step_raises() -> None:
    handler = signal.getsignal(signal.SIGINT)
    trainer = trainer_in(None, interrupting('start', 0))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is handler
