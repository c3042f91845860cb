# SPDX-License-Identifier: Apache-2.0
"""The lengths and types of sequences that the annotation of an argument allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import ml_collections
import pytest

from trainer import experiment
from trainer.config import loading, overrides, sequences
from trainer.config.errors import UserError

MLP = 'configs/mnist_mlp.py'


class Shaped:
    """Takes sequences of all kinds; its annotations are strings."""

    def __init__(
        self,
        kernel: int | Sequence[int] = 3,
        sizes: list[int] = [1],  # noqa: B006
        pair: tuple[int, int] = (1, 2),
        free=(1, 2),  # type: ignore[no-untyped-def]
        mixed=(1, 0.5),  # type: ignore[no-untyped-def]
        pairs: Sequence[tuple[int, int]] = ((1, 2),),
        perhaps: Optional[list[int]] = None,  # noqa: UP045
        rates: tuple[float, ...] = (1.0, 0.5),
        names: str | Sequence[str] = 'a',
        empty: Sequence[str] = (),
        words=('a', 'b'),  # type: ignore[no-untyped-def]
        unknown: NoSuchType = (1, 2),  # type: ignore[name-defined]  # noqa: F821
        labels: Sequence[tuple[str, float]] = (('a', 0.5),),
        either: Sequence[int | str] = (1,),
        anything: Sequence[Any] = (1,),
    ): ...


class Inherited(Shaped):
    """Inherits its constructor."""


class Point(NamedTuple):
    x: int
    y: int


def override_value(path: str, text: str, target: str = 'Shaped') -> Any:
    model = dict(
        target=f'{__name__}:{target}', kernel=3, sizes=[1], pair=(1, 2), free=(1, 2),
        mixed=(1, 0.5), pairs=((1, 2),), perhaps=None, rates=(1, 0.5), names='a', empty=(),
        words=('a', 'b'), unknown=(1, 2), labels=(('a', 0.5),), either=(1,), anything=(1,),
    )  # fmt: skip
    config = ml_collections.ConfigDict(dict(model=model))
    overrides.apply(config, [(path, text)])
    return loading.to_plain(config)['model'][path.rpartition('.')[2]]


@pytest.mark.parametrize(
    ('path', 'text', 'value'),
    [
        ('sizes', '(1, 2, 3)', [1, 2, 3]),
        ('sizes', '[]', []),
        ('kernel', '(3, 3)', (3, 3)),
        ('free', '(4,)', (4,)),
        ('unknown', '(4, 5, 6)', (4, 5, 6)),
        ('mixed', '(2, 0.1)', (2, 0.1)),
        ('pairs', '((1, 2), (3, 4), (5, 6))', ((1, 2), (3, 4), (5, 6))),
        ('perhaps', '(1, 2)', [1, 2]),
        ('rates', '(0.5, 1, 2)', (0.5, 1.0, 2.0)),
        ('names', '("a", "b")', ('a', 'b')),
        ('words', '("x", "y", {"ref": "a:b"})', ('x', 'y', {'ref': 'a:b'})),
        ('empty', '["x"]', ('x',)),
        ('labels', '(("head", 0.1), ("body", 1))', (('head', 0.1), ('body', 1.0))),
        ('labels', '(("head", 0.1),)', (('head', 0.1),)),
        ('either', '("a", 1)', ('a', 1)),
        ('either', '("a",)', ('a',)),
        ('anything', '("a", None, (1, 2), 0.5)', ('a', None, (1, 2), 0.5)),
        ('rates', '(inf, -inf, 1)', (math.inf, -math.inf, 1.0)),
    ],
)
def test_sequences_of_another_length(path: str, text: str, value: Any) -> None:
    for target in ('Shaped', 'Inherited'):
        new = override_value(f'model.{path}', text, target)
        assert new == value
        assert type(new) is type(value)


@pytest.mark.parametrize(
    ('path', 'text', 'message'),
    [
        ('pair', '(1, 2, 3)', r': expected 2 elements \(tuple\[int, int\]\), got 3'),
        ('pairs', '((1, 2, 3),)', r'\[0\]: expected 2 elements \(tuple\[int, int\]\), got 3'),
        ('mixed', '(1, 0.5, 2)', r': expected 2 elements, as in \(1, 0\.5\), got 3'),
        ('sizes', '(1, 2.5)', r'\[1\]: expected int, got 2\.5'),
        ('sizes', '5', r': expected a list like \[1\]'),
        ('kernel', '(3, "a")', r"\[1\]: expected int, got 'a'"),
        ('perhaps', '(1, None)', r'\[1\]: expected int, got None'),
        ('rates', '(1, 2, "x")', r"\[2\]: expected float, got 'x'"),
        ('words', '("x", ["y"])', r"\[1\]: expected str, as 'a' is, got \['y'\]"),
        ('words', '("x", None)', r'\[1\]: expected str, .* got None'),
        ('words', '({"y": 1},)', r'\[0\]: expected str, .* got \{'),
        ('labels', '(("a", 1.0), ("b", "c"))', r"\[1\]\[1\]: expected float, got 'c'"),
        ('labels', '(("a", 1.0), (2, 0.5))', r'\[1\]\[0\]: expected str, got 2'),
        ('either', '("a", 1.5)', r'\[1\]: expected int or str, got 1\.5'),
        ('empty', '(1,)', r'\[0\]: expected str, got 1'),
    ],
)
def test_values_that_the_annotation_does_not_allow(path: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf'^config\.model\.{path}{message}'):
        override_value(f'model.{path}', text)


def test_sequences_in_a_dict_and_from_python() -> None:
    for given in ((128, 64, 10), [128, 64, 10]):
        built = experiment.load_and_build(MLP, model__features=given)
        assert built.origin.config['model']['features'] == (128, 64, 10)
        built = experiment.load_and_build(MLP, model={'features': given})
        assert built.origin.config['model']['features'] == (128, 64, 10)
    built = experiment.load_and_build(MLP, model__features='[10]')
    assert built.origin.config['model']['features'] == (10,)
    with pytest.raises(UserError, match=r'features\[1\]: expected int, got 0\.5'):
        experiment.load_and_build(MLP, model__features=(128, 0.5, 10))


def test_durations_in_a_schedule_stay_texts() -> None:
    schedule = dict(target='optax:join_schedules', schedules=(), boundaries=(1000,))
    config = ml_collections.ConfigDict(
        dict(optimizer=dict(target='optax:sgd', learning_rate=schedule))
    )
    path = 'optimizer.learning_rate.boundaries'
    for text, value in (('("1 epochs", "50%")', ('1 epochs', '50%')), ('(1, 2, 3)', (1, 2, 3))):
        overrides.apply(config, [(path, text)])
        assert loading.to_plain(config)['optimizer']['learning_rate']['boundaries'] == value


@pytest.mark.parametrize(
    ('hint', 'fixed', 'hints'),
    [
        (Sequence[int], False, (int,)),
        (tuple[int, ...], False, (int,)),
        (tuple, False, (Any,)),
        (tuple[int, str], True, (int, str)),
        (tuple[()], True, ()),
        (int | Sequence[int] | None, False, (int,)),
        (tuple[int, int] | Sequence[float], False, (float,)),
        (Point, True, (Any, Any)),
    ],
)
def test_annotations(hint: Any, fixed: bool, hints: tuple[Any, ...]) -> None:
    assert sequences.elements(hint) == sequences.Elements(hints, fixed)


@pytest.mark.parametrize('hint', [int, str, bytes, dict[str, int], Any, None, int | str])
def test_annotations_that_allow_no_sequence(hint: Any) -> None:
    assert sequences.elements(hint) is None
