# SPDX-License-Identifier: Apache-2.0
"""A window of steps is traced, and the trace has the names of the modules."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.experiment import Experiment, load_and_build
from trainer.trainer import Trainer


def build(**overrides: Any) -> Experiment:
    options = {'train_for': '20 steps', 'evals': {}, 'data__source__limit': 640}
    return load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), **{**options, **overrides})


@pytest.fixture
def names_matter() -> Iterator[None]:
    """Makes the compile cache distinguish programs by the names in them."""
    jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
    yield
    jax.config.update('jax_compilation_cache_include_metadata_in_key', False)


@pytest.mark.slow
@pytest.mark.usefixtures('names_matter')
@pytest.mark.parametrize('calls', [1, 8])
def test_a_window_of_a_run(
    calls: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of the trace name the program and, forward and backward, its modules."""
    made = build(profile={'start': '6 steps', 'steps': 3}, steps_per_call=calls)
    trainer = Trainer(made, str(tmp_path))
    assert trainer.fit().step == 20
    (trace,) = (tmp_path / 'profile').rglob('*.trace.json.gz')
    assert b'jit_train_step' in gzip.decompress(trace.read_bytes())
    assert f'Trace written to {tmp_path}/profile' in capsys.readouterr().out
    named = read_trace(tmp_path)
    for layer in (b'Dense_0', b'Dense_1'):
        assert b'/jvp(MLP)/' + layer + b'/' in named
        assert b'/transpose(jvp(MLP))/' + layer + b'/' in named


def read_trace(directory: pathlib.Path) -> bytes:
    """Returns the trace of the compiled programs, whose operations have whole paths."""
    (file,) = (directory / 'profile').rglob('*.xplane.pb')
    return file.read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures('names_matter')
def test_nnx_modules_have_names_in_a_profiled_run(tmp_path: pathlib.Path) -> None:
    """Forward and backward; without a profile window the program is unchanged."""
    nnx = {'model__target': 'trainer.models.mlp_nnx:MLP', 'model__batch_norm': True}
    losses = {}
    for name, window in (('traced', {'start': '2 steps'}), ('plain', None)):
        trainer = Trainer(build(**nnx, profile=window), str(tmp_path / name))
        losses[name] = trainer.fit().metrics['train/loss']
        text = trainer.set_up().programs.step.executable().as_text()
        assert all(
            (f'jvp(MLP)/{part}_0/' in text) == (name == 'traced') for part in ('dense', 'norm')
        )
    assert all(
        b'jvp(MLP)/' + part in read_trace(tmp_path / 'traced') for part in (b'dense_0', b'norm_0')
    )
    assert losses['traced'] == losses['plain']


@dataclasses.dataclass(frozen=True)
class Named:
    """An annotation of the training loop: times in nanoseconds, and the step number."""

    name: str
    step: int | None
    start: float
    end: float


def names(directory: pathlib.Path) -> list[Named]:
    """Returns the steps and evaluations of a trace, in their order."""
    (file,) = (directory / 'profile').rglob('*.xplane.pb')
    events = [
        Named(e.name, dict(e.stats).get('step_num'), e.start_ns, e.start_ns + e.duration_ns)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for e in line.events
        if e.name == 'train' or e.name.startswith('eval ')
    ]
    return sorted(events, key=lambda event: event.start)


@pytest.mark.slow
@pytest.mark.parametrize(('calls', 'steps'), [(1, [5, 6, 7, 8, 9]), (4, [8, 9])])
def test_steps_and_evaluations_are_named(
    calls: int, steps: list[int], tmp_path: pathlib.Path
) -> None:
    """XProf derives step times from these names; fused steps have the number of the last one."""
    source = {'target': 'trainer.data.mnist:MNIST', 'split': 'test', 'limit': 64}
    evals = {'test': {'every': '8 steps', 'data': {'source': source, 'batch_size': 64}}}
    window = {'start': '4 steps', 'steps': 5}
    Trainer(build(profile=window, evals=evals, steps_per_call=calls), str(tmp_path)).fit()
    found = names(tmp_path)
    assert [x.step for x in found if x.name == 'train'] == steps
    at = steps.index(8) + 1
    assert [x.name for x in found] == ['train'] * at + ['eval test', 'train']
    for before, after in itertools.pairwise(found):
        assert before.end <= after.start
    if calls == 1:
        # A step lasts until the next one begins, and not only as long as its call.
        gaps = [after.start - before.end for before, after in itertools.pairwise(found[:at])]
        assert np.median(gaps) <= np.median([x.end - x.start for x in found[:at]])


@pytest.mark.slow
def test_nothing_is_annotated_outside_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('a step was named')

    monkeypatch.setattr(jax.profiler, 'StepTraceAnnotation', refuse)
    assert Trainer(build()).fit().step == 20
    assert Trainer(build(profile={'start': '2 steps'})).fit().step == 20


@pytest.mark.slow
def test_a_run_that_ends_inside_the_window_writes_its_trace(tmp_path: pathlib.Path) -> None:
    Trainer(build(profile={'start': '18 steps', 'steps': 100}), str(tmp_path)).fit()
    assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_without_a_directory_nothing_is_traced() -> None:
    assert Trainer(build(profile={'start': '2 steps'})).fit().status == 'finished'


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r'config\.profile\.steps: expected a positive number'):
        build(profile={'steps': 0})
