# SPDX-License-Identifier: Apache-2.0
"""The public names of the package: short, lazy, and imported by nothing inside."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys

import pytest

import trainer
from tests import command
from tests.command import ROOT

DOORS = ('sharding', 'schedules', 'metrics', 'scores', 'summaries', 'device_transforms')
PUBLIC = [
    'trainer:Experiment',
    'trainer:TaskOutput',
    'trainer:Trainer',
    'trainer:build',
    'trainer:load_and_build',
    'trainer:pad_shard_unpad',
    'trainer:precompute',
    'trainer.device_transforms:Mixup',
    'trainer.device_transforms:Resize',
    'trainer.ensemble:member_state',
    'trainer.metrics:AUC',
    'trainer.metrics:F1',
    'trainer.metrics:WeightedMean',
    'trainer.metrics:auc',
    'trainer.schedules:rsqrt',
    'trainer.scores:LinearProbe',
    'trainer.sharding:ByName',
    'trainer.summaries:Histogram',
    'trainer.summaries:image_of_figure',
    'trainer.tasks:Answer',
    'trainer.tasks:Classification',
    'trainer.tasks:Features',
    'trainer.tasks:NextToken',
    'trainer.tasks:Regression',
    'trainer.weights:Rename',
    'trainer.weights:Stack',
]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=command.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_no_jax() -> None:
    """Nor does listing its names; the first use of one does."""
    code = (
        'import sys, trainer\n'
        'dir(trainer), trainer.__all__\n'
        "heavy = ('jax', 'flax', 'optax', 'numpy')\n"
        'print([name for name in heavy if name in sys.modules])\n'
        'trainer.Trainer\n'
        'print([name for name in heavy if name in sys.modules])\n'
    )
    assert run(code).splitlines() == ['[]', "['jax', 'flax', 'optax', 'numpy']"]


@pytest.mark.parametrize('name', PUBLIC)
def test_public_names(name: str) -> None:
    module_name, _, attribute = name.partition(':')
    module = importlib.import_module(module_name)
    assert callable(getattr(module, attribute))
    assert attribute in module.__all__
    assert attribute in dir(module)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'Trainor'"):
        trainer.Trainor  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module('trainer.nosuch')


def test_no_module_has_the_name_of_a_lazy_attribute() -> None:
    """An imported submodule becomes an attribute of its package, and would hide the function."""
    modules = {module.name for module in pkgutil.iter_modules(trainer.__path__)}
    assert modules & {'sharding', 'trainer'} and not modules & set(trainer.__all__)


def test_the_stub_has_the_lazy_names() -> None:
    tree = ast.parse((ROOT / 'trainer' / '__init__.pyi').read_text())
    public = {
        alias.asname: importlib.import_module(node.module or '').__dict__[alias.name]
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert public == {name: getattr(trainer, name) for name in trainer.__all__}


@pytest.mark.parametrize('name', DOORS)
def test_public_modules_are_short_and_have_no_code(name: str) -> None:
    text = (ROOT / 'trainer' / f'{name}.py').read_text()
    assert text.count('\n') < 30
    docstring, *others = ast.parse(text).body
    assert isinstance(docstring, ast.Expr)
    assert {type(node) for node in others} == {ast.ImportFrom, ast.Assign}


@pytest.mark.slow
def test_the_package_runs_as_a_program() -> None:
    """Like `trainer.main`: output, exit codes, and only the user's lines in a traceback."""
    args = ('--config=mnist', '--config.data.batch_size=7', '--mode=config')
    main = command.run(*args)
    short = _run_package(*args)
    assert (short.returncode, short.stdout) == (main.code, main.out)
    wrong = _run_package('--config=mnist', '--config.seeed=3')
    assert wrong.returncode == 2
    assert wrong.stderr.startswith('Error: ') and 'Traceback' not in wrong.stderr


def _run_package(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', 'trainer', *args], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env=command.environment(),
    )  # fmt: skip
