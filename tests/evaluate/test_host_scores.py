# SPDX-License-Identifier: Apache-2.0
"""Scores and collecting metrics see every example of a split once, in its order."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests.evaluate import scored
from tests.marks import slow_except
from tests.parallel import group
from trainer.config.errors import UserError
from trainer.config.loading import LoadedConfig
from trainer.evaluate.evaluator import Stopped
from trainer.experiment import build
from trainer.trainer import Trainer

CONFIG = str(pathlib.Path(scored.__file__))
FIELDS = {'fields': ('label', 'name')}
SCORE = {'ref': 'tests.evaluate.scored:score', **FIELDS}
STREAMING = {'target': 'tests.evaluate.scored:Streaming', **FIELDS}


def trainer(config: ml_collections.ConfigDict, workdir: pathlib.Path | None = None) -> Trainer:
    loaded = LoadedConfig(config=config, name='scored', arg='', path=pathlib.Path(CONFIG))
    return Trainer(build(loaded), None if workdir is None else str(workdir))


def expected_area(trained: Trainer, state: Any) -> float:
    """The area computed from plain predictions."""
    batches = list(trained.predict('dev', state))
    logits = np.concatenate([batch['logits'] for batch in batches])
    labels = scored.Points(21, 1).gather(np.arange(21))['label']
    return scored.auc(labels, logits[:, 1] - logits[:, 0])


@pytest.mark.parametrize('batch_size', slow_except([8], [1, 8, 21, 64]))
def test_a_score_sees_the_split_once_for_any_batch_size(batch_size: int) -> None:
    config = scored.config(score=SCORE)
    config.evals.dev.data.batch_size = batch_size
    trained = trainer(config)
    result = trained.fit()
    area = expected_area(trained, result.state)
    assert result.metrics['eval/dev/area'] == area
    assert result.metrics['eval/dev/auc'] == area
    assert result.metrics['eval/dev/count'] == result.metrics['eval/dev/examples'] == 21
    assert np.isfinite(result.metrics['eval/dev/nested/mean'])


def test_a_streaming_score_sees_each_batch_without_padding() -> None:
    trained = trainer(scored.config(score=STREAMING))
    measured = trained.evaluate(trained.fit().state)['dev']
    assert measured['area'] == measured['auc']
    assert measured['largest'] == 8


def test_a_score_writes_arrays_texts_and_images(tmp_path: pathlib.Path) -> None:
    run = tmp_path / 'run'
    trainer(scored.config(score=SCORE), run).fit()
    assert np.load(run / 'metrics' / 'eval_dev_2.npz')['margins'].shape == (21,)
    summaries = run / 'summaries' / '2' / 'eval' / 'dev'
    assert (summaries / 'samples.txt').read_text() == 'first\n--------\nsecond\n'
    assert (summaries / 'grid.png').read_bytes().startswith(b'\x89PNG')


def test_the_best_checkpoint_follows_a_score(tmp_path: pathlib.Path) -> None:
    config = scored.config(score=SCORE)
    config.checkpoint = dict(best=dict(metric='eval/dev/area', mode='max'))
    assert trainer(config, tmp_path / 'run').fit().status == 'finished'
    assert trainer(config, tmp_path / 'run').restore('best').step == 2


def test_a_watched_metric_that_no_score_returns_is_an_error_after_a_save(
    tmp_path: pathlib.Path,
) -> None:
    config = scored.config(score=SCORE)
    config.checkpoint = dict(best=dict(metric='eval/dev/aera', mode='max'))
    with pytest.raises(UserError, match=r"best\.metric: evaluation 'dev' has no 'aera'"):
        trainer(config, tmp_path / 'run').fit()
    assert (tmp_path / 'run' / 'checkpoints' / '2').is_dir()
    # The next start runs the evaluation again, and does not call the run finished.
    with pytest.raises(UserError, match="has no 'aera'"):
        trainer(config, tmp_path / 'run').fit()


def test_a_score_that_fails_ends_the_run_after_a_save(tmp_path: pathlib.Path) -> None:
    config = scored.config(score={'ref': 'tests.evaluate.scored:failing'})
    with pytest.raises(RuntimeError, match='21 examples are too many') as caught:
        trainer(config, tmp_path / 'run').fit()
    assert 'This happened on the host, in config.evals.dev' in caught.value.__notes__
    assert (tmp_path / 'run' / 'checkpoints' / '2').is_dir()


def test_rows_of_training_leave_collecting_metrics_out(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger('trainer').propagate = True
    result = trainer(scored.config()).fit()
    assert 'eval/dev/auc' in result.metrics
    assert 'train/loss' in result.metrics
    assert 'train/auc' not in result.metrics
    assert 'auc needs all examples at once' in caplog.text


@pytest.mark.parametrize(
    ('score', 'message'),
    [
        ({'ref': 'tests.evaluate.scored:score', 'fields': ('lable',)}, "no field 'lable'; they ha"),
        ({'ref': 'tests.evaluate.scored:Streaming'}, 'got the class Streaming'),
        ({'ref': 'tests.evaluate.scored:FIRST_ID'}, 'expected a function, as ref='),
        ({'ref': 'tests.evaluate.scored:scroe'}, 'Did you mean tests.evaluate.scored:score?'),
    ],
)
def test_mistakes_in_a_score_are_found_before_training(score: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        trainer(scored.config(score=score)).compile()
    assert message in str(caught.value)


def test_a_score_needs_predictions() -> None:
    config = scored.config(score=SCORE)
    config.evals.dev.task = dict(ref='tests.evaluate.test_host_scores:loss_only')
    with pytest.raises(UserError, match=r'config\.evals\.dev: .* does not call the model'):
        trainer(config).compile()


def loss_only(model: Any, batch: Any) -> Any:
    return batch['x'][:, 0]


class Predictor:
    """A task without a loss."""

    def predict(self, model: Any, batch: Any) -> Any:
        return {'logits': model(batch['x']), **{name: batch[name] for name in ('id', 'name')}}


def count_rows(examples: Any) -> Any:
    return {'rows': len(examples['logits']), 'last': int(examples['id'][-1] - scored.FIRST_ID)}


def without_loss(task: str, score: Any) -> Trainer:
    config = scored.config(score=score)
    config.evals.dev.task = dict(target=f'tests.evaluate.test_host_scores:{task}')
    return trainer(config)


def test_a_task_with_a_score_needs_only_predict() -> None:
    trained = without_loss('Predictor', {'ref': 'tests.evaluate.test_host_scores:count_rows'})
    metrics = trained.fit().metrics
    found = {name: value for name, value in metrics.items() if name.startswith('eval/dev/')}
    assert found == {'eval/dev/rows': 21, 'eval/dev/last': 20, 'eval/dev/examples': 21}


def test_a_task_without_a_loss_needs_a_score() -> None:
    with pytest.raises(UserError, match=r'must take \(model, batch\)'):
        without_loss('Predictor', None)


def test_a_field_with_the_name_of_a_prediction_is_refused() -> None:
    config = scored.config(score={**SCORE, 'fields': ('label', 'name', 'logits')})
    config.evals.dev.data.transforms = (dict(ref='tests.evaluate.test_host_scores:with_logits'),)
    with pytest.raises(UserError, match="'logits' is also a name among the outputs"):
        trainer(config).compile()


def with_logits(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, 'logits': batch['x']}


def scalar(examples: Any) -> Any:
    return {}


class ReturnsAScalar(scored.Task):
    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        return {'total': model(batch['x']).sum()}


def test_a_prediction_that_is_not_one_row_for_each_example_is_refused() -> None:
    config = scored.config(score={'ref': f'{__name__}:scalar'})
    config.evals.dev.task = dict(target=f'{__name__}:ReturnsAScalar')
    with pytest.raises(UserError, match=r"returned 'total' as float32\[\]; expected an array with"):
        trainer(config).compile()


class Broken(scored.Streaming):
    calls = 0

    def __call__(self, examples: Any) -> None:
        Broken.calls += 1
        raise RuntimeError('in the first batch')


def test_a_streaming_score_that_fails_is_not_called_again() -> None:
    trained = trainer(scored.config(score={'target': f'{__name__}:Broken'}))
    with pytest.raises(RuntimeError, match='in the first batch'):
        trained.evaluate(trained.init_state())
    assert Broken.calls == 1


def kinds(examples: Any) -> Any:
    return {'none': [], 'nested': {'text': 'a \ud800 b', 'number': 1.0}}


ENDED: list[str] = []


class Recording(scored.Streaming):
    """Records how each of its objects ends."""

    def __init__(self, fails: str = ''):
        super().__init__()
        self.fails = fails

    def __call__(self, examples: Any) -> None:
        if self.fails == 'call':
            raise RuntimeError('call failed')
        super().__call__(examples)

    def close(self) -> dict[str, Any]:
        ENDED.append('close')
        if self.fails == 'close':
            raise RuntimeError('close failed')
        return {'batches': len(self.batches)}

    def discard(self) -> None:
        ENDED.append('discard')
        if self.fails:
            raise RuntimeError('nor can it be discarded')


@pytest.mark.parametrize(
    ('fails', 'is_stopped', 'ends'),
    [
        ('', False, ['close']),
        ('', True, ['discard']),
        ('call', False, ['discard']),
        ('close', False, ['close']),
    ],
)
def test_a_streaming_score_is_closed_or_discarded(
    fails: str, is_stopped: bool, ends: list[str]
) -> None:
    score = {'target': f'{__name__}:Recording', 'fails': fails}
    trained = trainer(scored.config(score=score))
    evaluator, state = trained.set_up().evaluators['dev'], trained.init_state()
    ENDED.clear()
    error: Any = contextlib.nullcontext()
    if is_stopped:
        error = pytest.raises(Stopped)
    elif fails:
        error = pytest.raises(RuntimeError, match=f'{fails} failed')
    batches = iter(range(10))
    with error:
        evaluator.run(state, should_stop=lambda: is_stopped and next(batches) == 2)
    assert ends == ENDED


def test_the_score_that_is_built_to_find_mistakes_is_discarded() -> None:
    ENDED.clear()
    trainer(scored.config(score={'target': f'{__name__}:Recording'}))
    assert ENDED == ['discard']


def test_texts_may_be_nested_and_lists_empty(tmp_path: pathlib.Path) -> None:
    run = tmp_path / 'run'
    result = trainer(scored.config(score={'ref': f'{__name__}:kinds'}), run).fit()
    assert result.metrics['eval/dev/nested/number'] == 1.0
    written = run / 'summaries' / '2' / 'eval' / 'dev' / 'nested' / 'text.txt'
    assert written.read_text() == 'a \\ud800 b\n'


def lists(examples: Any) -> dict[str, Any]:
    rows = [jnp.zeros(2), jnp.ones(2)]
    return {'each': [0.25, np.float32(0.5)], 'rows': rows, 'one': [3], 'mean': np.float64(0.5)}


def test_a_list_of_numbers_is_an_array(tmp_path: pathlib.Path) -> None:
    found = trainer(scored.config(score={'ref': f'{__name__}:lists'}), tmp_path / 'run').fit()
    arrays = np.load(tmp_path / 'run' / 'metrics' / 'eval_dev_2.npz')
    np.testing.assert_array_equal(arrays['each'], [0.25, 0.5])
    np.testing.assert_array_equal(arrays['rows'], [[0, 0], [1, 1]])
    assert found.metrics['eval/dev/one'] == 3
    # As numbers of Python, which print as such.
    assert {type(value) for value in found.metrics.values()} == {int, float}


def test_a_dry_run_computes_no_score(tmp_path: pathlib.Path) -> None:
    trained = trainer(scored.config(score={'ref': 'tests.evaluate.scored:failing'}))
    trained.compile()
    evaluator = trained.set_up().evaluators['dev']
    assert 'loss' in evaluator.run(trained.init_state(), max_batches=1)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the inputs of each call of the model that is traced."""
    found: list[Any] = []
    call = scored.Net.__call__

    def count_call(self: Any, x: Any) -> Any:
        found.append(x)
        return call(self, x)

    monkeypatch.setattr(scored.Net, '__call__', count_call)
    return found


@pytest.mark.parametrize(
    ('task', 'has_score'),
    [
        ('scored:Task', False),  # With a collecting metric.
        ('scored:Task', True),
        ('test_host_scores:no_predict', True),
    ],
)
def test_the_program_of_an_evaluation_calls_the_model_once(
    task: str, has_score: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scored.config(**({'score': {'ref': f'{__name__}:count'}} if has_score else {}))
    kind = 'target' if task.endswith('Task') else 'ref'
    config.task = {kind: f'tests.evaluate.{task}'}
    trained = trainer(config)
    state, evaluator = trained.init_state(), trained.set_up().evaluators['dev']
    evaluator.prepare(state)
    calls = count_calls(monkeypatch)
    found = evaluator.run(state)
    assert len(calls) == 1
    assert found.get('count', 21) == 21


def no_predict(model: Any, batch: Any) -> Any:
    # Not the batch itself, as after any preparation in the task.
    return (model(2 * batch['x']) ** 2).sum(-1)


def count(examples: dict[str, np.ndarray]) -> dict[str, int]:
    return {'count': len(next(iter(examples.values())))}


def test_an_ensemble_is_scored_as_one_model() -> None:
    config = scored.config(score=SCORE)
    config.ensemble = dict(size=2)
    trained = trainer(config)
    result = trained.fit()
    assert result.metrics['eval/dev/area'] == expected_area(trained, result.state)
    assert result.metrics['eval/dev/auc'] == result.metrics['eval/dev/area']


@pytest.mark.slow
@pytest.mark.parametrize(
    ('score', 'processes', 'devices', 'mesh', 'examples'),
    [
        ('score', 2, 2, '{"data": 2, "model": 2}', 21),  # Each row is on two devices.
        ('Streaming', 4, 1, '{"data": 4}', 9),  # Two processes have no row of the last batch.
    ],
)
def test_processes_send_their_rows_to_the_first(
    score: str, processes: int, devices: int, mesh: str, examples: int, tmp_path: pathlib.Path
) -> None:
    given = (f'--config={CONFIG}:{score}', f'--config.evals.dev.data.source.n={examples}')
    running = group.start(
        processes, tmp_path / 'run', f'--config.mesh={mesh}', config=given, devices=devices
    )
    codes, _, errors = group.finish(running)
    assert codes == [0] * processes, errors
    metrics = json.loads((tmp_path / 'run' / 'result.json').read_text())['metrics']
    config = scored.get_config(score)
    config.evals.dev.data.source.n = examples
    alone = trainer(config).fit().metrics
    for name in ('area', 'auc', 'examples'):
        assert metrics[f'eval/dev/{name}'] == alone[f'eval/dev/{name}']


@pytest.mark.slow
def test_a_score_that_fails_in_the_first_process_ends_all_after_a_save(
    tmp_path: pathlib.Path,
) -> None:
    given = (f'--config={CONFIG}:failing',)
    codes, _, errors = group.finish(group.start(2, tmp_path / 'run', config=given))
    assert codes == [1, 75], errors
    assert 'examples are too many' in errors[0]
    assert 'could not be computed in process 0: RuntimeError: 21 examples' in errors[1]
    assert (tmp_path / 'run' / 'checkpoints' / '2').is_dir()
