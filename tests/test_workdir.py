# SPDX-License-Identifier: Apache-2.0
"""The files of a run's directory."""

from __future__ import annotations

import json
import math
import pathlib

import pytest

from trainer.config.errors import UserError
from trainer.workdir import Workdir


def refuse(constant: str) -> None:
    raise AssertionError(f'{constant} is not JSON')


def test_values_that_are_not_finite_are_null_in_the_result(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    assert workdir.result() is None
    metrics = {'nan': math.nan, 'inf': math.inf, 'minus': -math.inf, 'one': 1.5, 'examples': 3}
    workdir.write_result('finished', 7, 'aa', 'bb', metrics)
    stored = json.loads((tmp_path / 'result.json').read_text(), parse_constant=refuse)
    finite = {'one': 1.5, 'examples': 3}
    assert stored['metrics'] == {'nan': None, 'inf': None, 'minus': None, **finite}
    result = workdir.result()
    assert result is not None
    assert (result['status'], result['step']) == ('finished', 7)
    assert all(math.isnan(result['metrics'].pop(name)) for name in ('nan', 'inf', 'minus'))
    assert result['metrics'] == finite


def test_where_nothing_can_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'nothing can be written to .*: Not a directory'):
        Workdir(tmp_path / 'file' / 'run').make()
    with pytest.raises(UserError, match=r'nothing can be written to .*: File exists'):
        Workdir(tmp_path / 'file').make()
    Workdir(tmp_path / 'a' / 'b').make()
    assert list((tmp_path / 'a' / 'b').iterdir()) == []
