# SPDX-License-Identifier: Apache-2.0
"""Every file and command that the README shows runs, and does what it is there for."""

from __future__ import annotations

import re

import pytest

from tests.readme import (
    COMMANDS,
    EXPORT,
    FILES,
    OTHERS,
    PRETRAINED,
    QUICKSTART,
    TESTS,
    Project,
)

# What a command says if it has done what it is there for, by a part of the command.
SAYS = (
    ('--mode=summary', r'^824,458 parameters, 3\.3 MB$'),
    ('--mode=dry_run', r'^Everything works; nothing was kept\.$'),
    ('--mode=config', r"^train_for = '3 steps'  # --config\.train_for=3steps$"),
    ('--helpconfig', r'^  --config\.optimizer\.learning_rate +float +0\.01$'),
    ('--mode=eval', r'^eval test: .*accuracy'),
    ('--mode=predict', r'predictions_test_3\.npz: 1,000 rows'),
    ('--mode=plan', r'v5e'),
    ('--mode=grad_probe', r'Conv_1'),
    ('--mode=export', r'model\.jax_export\(batch\) for cpu, cuda, tpu$'),
    ('learning_rate=0.1', r'^  train/learning_rate 0\.1$'),
    ('optimizer=', r'^  train/learning_rate 0\.01$'),
    ('optax:adam', r'^config\.optimizer\.momentum dropped: optax:adam does not take it$'),
    ('XLA_FLAGS', r'^devices +8 x cpu .*mesh data 2 x fsdp 2 x model 2$'),
    ('mine/config.py', r'confusion/counts int32\[10, 10\] in .*/metrics/eval_table_100\.npz$'),
    ('scan_layers', r'^blocks/'),
    ('ensemble', r'^eval test at step 3: .*members'),
    ('mine/config.py', r'^eval sure at step 100: .*examples 77$'),
    ('mine/config.py', r'^hook: step 50 wrong [\d.]+$'),
    ('gan/', r'^  train/gen_loss '),
    ('sam.step', r'^  train/first_norm '),
    ('init_from.path', r'^start .*runs/pretrained'),
    ('transfer/digits', r'^start .*runs/pretrained'),
)


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Made once; each test runs the commands that it needs, if no other has."""
    return Project(tmp_path_factory.mktemp('project'))


def test_the_readme_has_what_this_file_looks_for() -> None:
    assert len(FILES) == 22
    assert (QUICKSTART, TESTS) == ('launch/local.sh --config=configs/mnist.py', 'launch/test.sh')
    assert PRETRAINED in COMMANDS and EXPORT in COMMANDS
    assert len(COMMANDS) >= 30
    assert [text for text in OTHERS if 'klinen' not in text] == []
    assert len(OTHERS) == 1


@pytest.mark.slow
@pytest.mark.parametrize('line', dict.fromkeys(c for c in COMMANDS if c != TESTS))
def test_command(line: str, project: Project) -> None:
    finished = project.run(line)
    words = [word for part, word in SAYS if part in line]
    if '--mode=' not in line and '--helpconfig' not in line:
        words.append(r'finished at step')
    assert words
    for word in words:
        assert re.search(word, finished.out + finished.err, flags=re.MULTILINE), word


# The files that are programs, and the last line that each of them prints.
SCRIPTS = {
    'notebook.py': r"\{'test': \{.*'accuracy': .*\}\}",
    'full_evaluation.py': r'980 \[  980 10000\]',
    'generate.py': r'b[\'"].* b[\'"].*',
    'weights.py': r'\(64, 20\) \(64, 20\)',
    'features.py': r'0\.\d+',
    'call_exported.py': r'\(3,\)',
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SCRIPTS)
def test_script(name: str, project: Project) -> None:
    printed = project.script(name)
    assert re.fullmatch(SCRIPTS[name], printed.splitlines()[-1])
    if name == 'notebook.py':
        assert 'resumed from step 100' in printed
        assert 'finished' in printed
    if name == 'full_evaluation.py':  # B1, B2, B4, B5, B6: on eight devices, by one program.
        assert re.search(r"'accuracy': 0\.0979+\d*, 'examples': 10000\b", printed)
        assert printed.count('compiled for') == 1
    if name == 'weights.py':
        assert printed.splitlines()[0] == '(64, 10)'
    if name == 'features.py':
        assert float(printed.splitlines()[-1]) > 0.5


def test_each_file_is_run() -> None:
    """A program by itself; what is in a package by the commands and files that name it."""
    assert {name for name in FILES if '/' not in name} == set(SCRIPTS)
    for name in set(FILES) - set(SCRIPTS):
        named = (
            name,
            name.removesuffix('.py').replace('/', '.') + ':',
            f'from {name[:-3]}'.replace('/', '.'),
        )
        others = [*COMMANDS, *(text for other, text in FILES.items() if other != name)]
        assert any(word in text for text in others for word in named), name
