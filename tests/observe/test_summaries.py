# SPDX-License-Identifier: Apache-2.0
"""Summaries: their values, their files, their names, and what a resume removes."""

from __future__ import annotations

import io
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.observe.test_writers import events
from trainer.config.errors import UserError
from trainer.observe.summaries import Histogram, Images, with_summaries
from trainer.observe.summary_files import check_name, remove_after, write_files
from trainer.observe.writers import TensorBoard


class Figure:
    """Has the method of a matplotlib figure that is used, without the dependency."""

    def savefig(self, file: io.BytesIO, *, format: str, dpi: str) -> None:
        Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(file, format)


def test_a_histogram_counts_the_finite_values(tmp_path: pathlib.Path) -> None:
    values = [0.0, 1.0, 1.0, 4.0, np.nan, np.inf]
    for array in (np.array(values), jnp.array(values, jnp.bfloat16)):
        histogram = Histogram(array, bins=4)
        assert (histogram.low, histogram.high, histogram.mean) == (0.0, 4.0, 1.5)
        assert histogram.counts.tolist() == [1, 2, 0, 1]
    path = histogram.write(epath.Path(tmp_path / 'h'))
    loaded = np.load(path)
    assert loaded['edges'].tolist() == [0, 1, 2, 3, 4]
    assert loaded['counts'].tolist() == [1, 2, 0, 1]
    assert loaded['std'] == pytest.approx(np.std([0, 1, 1, 4]))


@pytest.mark.parametrize(('values', 'counts'), [([2, 2], [2, 0]), ([], [0, 0]), ([np.nan], [0, 0])])
def test_a_histogram_of_equal_or_of_no_values(values: list[float], counts: list[int]) -> None:
    assert Histogram(np.array(values), bins=2).counts.tolist() == counts


def test_a_histogram_has_real_numbers() -> None:
    with pytest.raises(UserError, match='Histogram: expected an array of real numbers, got'):
        Histogram(['a'])


def test_tensorboard_has_histograms(tmp_path: pathlib.Path) -> None:
    writer = TensorBoard(tmp_path)
    writer.write_summaries(3, {'eval/dev/margin': Histogram(np.array([0.0, 1.0, 1.0]), bins=2)})
    writer.close()
    [value] = [v for event in events(tmp_path) for v in event.summary.value]
    assert value.tag == 'eval/dev/margin'
    assert (value.histo.num, value.histo.sum, list(value.histo.bucket)) == (3, 2, [1, 2])
    assert list(value.histo.bucket_limit) == [0.5, 1.0]


def test_a_figure_is_an_image() -> None:
    summary = with_summaries('figure', Figure())
    assert isinstance(summary, Images)
    assert summary.images.shape == (1, 4, 6, 3)


@pytest.mark.parametrize('name', ['a', 'a/b.c', 'café', 'step 3', '..a'])
def test_names_of_files(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    'name',
    ['', '/a', 'a//b', '../a', 'a/..', '.', 'a:b', 'a\\b', 'a\n', 'a\0', 'a?', ' a', 'x' * 201],
)
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UserError, match=r'a summary is named .*expected parts of at most 200'):
        check_name(name)


def test_a_resume_removes_the_files_of_later_steps(tmp_path: pathlib.Path) -> None:
    directory = epath.Path(tmp_path)
    for step in (2, 10):
        write_files(directory, step, {'eval/dev/margin': Histogram([1.0])})
        (directory / 'metrics').mkdir(exist_ok=True)
        (directory / 'metrics' / f'eval_dev_{step}.npz').write_text('')
    (tmp_path / 'summaries' / 'notes').mkdir()
    remove_after(directory, 2)
    assert sorted(path.name for path in tmp_path.glob('*/*')) == ['2', 'eval_dev_2.npz', 'notes']
    remove_after(directory / 'none', 2)


@pytest.mark.parametrize(('value', 'kind'), [(None, 'NoneType'), ([[1], [2, 3]], 'list')])
def test_a_value_that_cannot_be_written_is_refused(value: object, kind: str) -> None:
    message = rf"the value 'part/mean' is a {kind}; expected a number, an array, text, a summary"
    with pytest.raises(UserError, match=message):
        with_summaries('part', {'mean': value})


class Tensor:
    """An array of another library."""

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.array(0.25)


def test_arrays_of_other_libraries_are_arrays() -> None:
    assert with_summaries('mean', Tensor()) == 0.25
