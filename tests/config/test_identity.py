# SPDX-License-Identifier: Apache-2.0
"""The same command has the same work directory, and different commands have different ones."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re

import pytest

from tests.command import ROOT
from trainer.config import diff, identity, loading, overrides

RATE, SEED = ('optimizer.learning_rate', '0.1'), ('seed', '3')
MERGE_A, MERGE_B = ('optimizer', '{"momentum": 0.5}'), ('optimizer', '{"nesterov": True}')
DIGEST = re.compile(r'-[0-9a-f]{8}$')


def workdir(*assignments: tuple[str, str], name: str = 'mnist', arg: str = '') -> str:
    loaded = loading.load(str(ROOT / 'configs' / 'mnist.py'))
    applied = overrides.apply(loaded.config, assignments)
    path = ROOT / 'configs' / f'{name}.py'
    return identity.default_workdir(dataclasses.replace(loaded, path=path, arg=arg), applied)


def workdir_for_unknown_keys(*assignments: tuple[str, str]) -> str:
    """Returns the directory for overrides of keys that the config does not have."""
    loaded = loading.load(str(ROOT / 'configs' / 'mnist.py'))
    given = [
        overrides.Override(path=path, value_path=path, text=text, old=None, new=text)
        for path, text in assignments
    ]
    return identity.default_workdir(loaded, given)


@pytest.mark.parametrize('order', list(itertools.permutations((RATE, SEED, ('accumulate', '2')))))
def test_order_does_not_matter(order: tuple[tuple[str, str], ...]) -> None:
    assert workdir(*order) == 'runs/mnist-accumulate=2,optimizer.learning_rate=0.1,seed=3'


@pytest.mark.parametrize(
    'free',
    [
        ('train_for', '5 steps'), ('log.every', '1 steps'), ('log', '{"tensorboard": False}'),
        ('checkpoint.best.metric', 'eval/test/loss'), ('evals.test.every', 'never'),
        ('hooks', '{"a": {"target": "x:y"}}'), ('mesh.data', '2'), ('sharding', 'fsdp'),
        ('steps_per_call', '4'),
        ('data.prefetch', '0'), ('evals.test.data.device_transforms[0].key', 'x'),
    ],
)  # fmt: skip
def test_overrides_outside_the_identity_are_not_in_the_name(free: tuple[str, str]) -> None:
    assert workdir(free) == workdir() == 'runs/mnist'
    assert workdir(free, SEED) == workdir(SEED, free) == 'runs/mnist-seed=3'


@pytest.mark.parametrize(
    ('path', 'counts'),
    [
        ('train_for', False), ('data.prefetch', False), ('evals.test.every', False),
        ('data.loader.workers', False), ('data.loader.stages', True),
        ('hooks[0]', False), ('log', False), ('training', True), ('train_form', True),
        ('logging.every', True), ('data', True), ('data.prefetcher', True), ('seed', True),
        ('model.log', True), ('vars.width', True),
    ],
)  # fmt: skip
def test_identity_compares_complete_keys(path: str, counts: bool) -> None:
    assert identity.is_identity(path) is counts
    change = diff.Change(path, 1, 2)
    assert identity.identity_changes([change]) == ([change] if counts else [])


def test_the_last_override_of_a_key_counts() -> None:
    assert workdir(('seed', '1'), ('seed', '2'), SEED) == workdir(SEED)


@pytest.mark.parametrize(('length', 'hashed'), [(70, False), (86, False), (87, True), (500, True)])
def test_long_names_end_in_a_hash(length: int, hashed: bool) -> None:
    name = workdir_for_unknown_keys(('model.a', 'x' * length))
    assert name.startswith('runs/mnist-model.a=xxx')
    assert bool(DIGEST.search(name)) is hashed
    assert len(name.removeprefix('runs/')) == (100 if hashed else length + 14)
    assert name == workdir_for_unknown_keys(('model.a', 'x' * length))
    assert name != workdir_for_unknown_keys(('model.a', 'x' * (length + 1)))


@pytest.mark.parametrize(
    'text', ['a b', 'a/b', '../../a', 'a:b', '(1, 2)', '{"a": 1}', 'a=b', 'a,b', '', '..', 'é', '*']
)
def test_a_name_is_one_directory(text: str) -> None:
    name = workdir_for_unknown_keys(('model.a', text))
    assert re.fullmatch(r'runs/mnist-model\.a=[\w.+,=%-]*', name)
    assert name not in (workdir(), workdir_for_unknown_keys(('model.a', 'a_b')))


def test_the_file_and_its_argument_are_in_the_name() -> None:
    assert workdir(name='resnet', arg='deep') == 'runs/resnet-deep'
    assert workdir(SEED, name='resnet', arg='deep') == 'runs/resnet-deep-seed=3'


def test_files_of_one_name_in_two_folders_have_different_directories(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def workdir_of(path: pathlib.Path) -> str:
        loaded = loading.load(str(ROOT / 'configs' / 'mnist.py'))
        return identity.default_workdir(dataclasses.replace(loaded, path=path), ())

    monkeypatch.chdir(tmp_path)
    assert workdir_of(pathlib.Path('configs/mnist.py')) == 'runs/mnist'
    assert workdir_of(ROOT / 'configs' / 'mnist.py') == 'runs/mnist'
    assert workdir_of(pathlib.Path('mnist.py')) == 'runs/mnist'
    assert workdir_of(pathlib.Path('configs/a/mnist.py')) == 'runs/a.mnist'
    assert workdir_of(pathlib.Path('a/configs/mnist.py')) == 'runs/a.configs.mnist'
    outside = [workdir_of(tmp_path.parent / folder / 'mnist.py') for folder in 'ab']
    assert all(re.fullmatch(r'runs/mnist\.[0-9a-f]{8}', name) for name in outside)
    assert len(set(outside)) == 2


def test_different_commands_have_different_directories() -> None:
    """Each pair would have the same directory if the words were just joined."""
    directories = [
        workdir(name='mnist', arg='a'),
        workdir(name='mnist-a'),
        workdir(name='mnist_a'),
        workdir(SEED),
        workdir(arg='seed=3'),
        workdir(name='mnist-seed=3'),
        workdir(SEED, arg='a'),
        workdir(SEED, name='mnist-a'),
        workdir(arg='a-seed=3'),
        workdir(arg='a,b'),
        workdir(arg='a/b'),
        workdir(arg='a b'),
        workdir_for_unknown_keys(('x', '1,y=2')),
        workdir_for_unknown_keys(('x', '1'), ('y', '2')),
        workdir_for_unknown_keys(('x', '1_y_2')),
        workdir_for_unknown_keys(('x', '1-y=2')),
        workdir_for_unknown_keys(('x[0]', '1')),
        workdir_for_unknown_keys(('x_0_', '1')),
        workdir_for_unknown_keys(('x.a-b', '1')),
        workdir(MERGE_A),
        workdir(MERGE_B),
        workdir(MERGE_A, MERGE_B),
        workdir(MERGE_A, ('optimizer.momentum', '0.7')),
        workdir(('optimizer.momentum', '0.7'), MERGE_A),
        workdir(('optimizer.momentum', '0.7')),
        workdir(('data.device_transforms[0].key', 'x'), ('data.device_transforms', '()')),
        workdir(('data.device_transforms', '()')),
        workdir(('optimizer.target', 'optax:adam'), ('optimizer.target', 'optax:sgd')),
        workdir(('optimizer.target', 'optax:sgd')),
    ]
    assert len(set(directories)) == len(directories)


def test_the_order_of_unrelated_merges_does_not_matter() -> None:
    assert workdir(MERGE_A, SEED) == workdir(SEED, MERGE_A)


def test_an_override_without_effect_is_not_in_the_name() -> None:
    assert workdir(('seed', '0')) == workdir()
    assert workdir(('seed', '1')) != workdir()
