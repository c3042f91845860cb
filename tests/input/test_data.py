# SPDX-License-Identifier: Apache-2.0
"""Wrapped loaders: optional parts may be missing, violations of the protocol are named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.command import ROOT
from tests.step import tiny
from trainer.config.errors import UserError
from trainer.data.loader import Block, TrainLoader
from trainer.data.sources import ArraySource
from trainer.input.data import EvalData, TrainData


def source() -> ArraySource:
    return ArraySource({'x': np.arange(50, dtype=np.float32)})


class Whole:
    """A loader with all required attributes and no more; tests remove some."""

    examples = 8
    steps_per_epoch = 2

    def __init__(
        self, *, source: Any = None, batch_size: int = 4, transforms: Any = (), seed: int = 0,
        shuffle: bool = True, remainder: str = 'carry', repeat_batch: int | None = None,
    ):  # fmt: skip
        self.spec = {'x': np.zeros((4, 1), np.float32)}

    def block(self, start: int, count: int, rows: Any = slice(None)) -> Block:
        ids = (np.arange(start, start + count)[:, None] * 4 + np.arange(4)) % 8
        return Block({'x': ids[:, rows, None].astype(np.float32)}, ids[:, rows])


class Wrapping:
    """Forwards every attribute to another loader."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_optional_parts_may_be_missing() -> None:
    data = TrainData.from_loader(Whole(), 'config.data.loader')
    assert (data.is_stream, data.marks, data.with_first) == (False, (), None)
    assert data.first_example()['x'].tolist() == [[0]]
    data.restore(3, None)
    data.close()
    assert data.block(1, 1).states is None
    with pytest.raises(UserError, match=r'Whole cannot resume a run whose batch size was 2'):
        data.with_batch_sizes(((0, 2), (5, 4)))


def test_a_loader_that_forwards_its_attributes() -> None:
    data = TrainData.from_loader(
        Wrapping(TrainLoader(source=source(), batch_size=4)), 'config.data.loader'
    )
    assert data.with_first is not None and not data.is_stream
    with pytest.raises(UserError, match='Wrapping has no `examples`'):
        TrainData.from_loader(Wrapping(remove_attribute('examples')), 'config.data.loader')


def test_a_property_is_not_evaluated_by_the_check() -> None:
    class Reading(Whole):
        @property
        def first(self) -> Any:
            raise AssertionError('reads data')

    assert TrainData.from_loader(Reading(), 'config.data.loader').with_first is not None


class NoRows(Whole):
    def block(self, start: int, count: int) -> Block:  # type: ignore[override]
        return super().block(start, count)


class OneArgument(Whole):
    def restore(self, state: Any) -> None: ...


class NoMarks(Whole):
    def after(self, batch_sizes: Any) -> Any:
        return self


class NoMethod(Whole):
    close = True


def remove_attribute(name: str) -> Any:
    kept = {k: v for k, v in vars(Whole).items() if k not in (name, '__dict__', '__weakref__')}
    return type('Part', (), kept)()


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        *((remove_attribute(n), f'Part has no `{n}`; this loader needs examples, steps_per_epoch')
          for n in ('examples', 'steps_per_epoch', 'block')),
        (object(), 'object has no `examples`, `steps_per_epoch`, `spec`, `block`; this loader'),
        (NoRows(), r'NoRows.block cannot be called as block\(start, count, rows=slice\(None\)\)'),
        (OneArgument(), r'OneArgument.restore cannot be called as restore\(position, state\)'),
        (NoMarks(), 'NoMarks has `after` but no `marks`; see '),
        (NoMethod(), r'NoMethod.close cannot be called as close\(\)'),
    ],
)  # fmt: skip
def test_violations_of_the_protocol_are_named(loader: Any, message: str) -> None:
    with pytest.raises(UserError, match=f'^config.data.loader: {message}'):
        TrainData.from_loader(loader, 'config.data.loader')


def test_a_training_loader_is_refused_for_evaluation() -> None:
    expected = 'TrainLoader has no `num_batches`; .*: see trainer.input.loader.EvalLoader'
    with pytest.raises(UserError, match=expected):
        EvalData.from_loader(
            TrainLoader(source=source(), batch_size=4), 'config.evals.test.data.loader'
        )


def test_the_check_runs_when_the_config_is_built() -> None:
    data = {'source': tiny.SOURCE, 'batch_size': 32, 'loader': {'target': f'{__name__}:NoRows'}}
    with pytest.raises(UserError, match=r'config\.data\.loader: NoRows\.block cannot be called'):
        tiny.trainer(data=data)


def test_no_other_file_checks_optional_parts() -> None:
    """Optional parts are checked in `trainer.input.data` alone."""
    abilities = '|'.join(('restore', 'first', 'close', 'after', 'marks', 'states', 'block'))
    asks = re.compile(rf"(hasattr|getattr(_static)?)\([^)]*'({abilities})'")
    files = [p for p in (ROOT / 'trainer').rglob('*.py') if 'bundled' not in p.parts]
    # A score may have `close` too: see `is_streaming`.
    files = [p for p in files if p.name != 'score.py']
    found = [str(p) for p in files if asks.search(p.read_text())]
    assert found == [] and len(files) > 100
