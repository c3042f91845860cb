# SPDX-License-Identifier: Apache-2.0
"""Every file, command and code block of a page runs and does what the page says."""

from __future__ import annotations

import pathlib
import re
import shlex
import tomllib

import pytest

from tests import command
from tests.examples.test_imagenet import write_images
from tests.launch.test_commands_of_readme import check as check_launcher
from tests.pages import (
    ALL_COMMANDS,
    COMMANDS,
    FILES,
    FRAGMENTS,
    OTHERS,
    QUICKSTART,
    TESTS,
    Block,
    Project,
    is_of_trainer,
    parameters,
)

# What a command says if it has done what it is there for, by a part of the command.
SAYS = (
    ('--mode=summary', r'^[\d,]+ parameters, '),
    ('--mode=dry_run', r'^Everything works; nothing was kept\.$'),
    ('--mode=config', r"^train_for = '3 steps'  # --config\.train_for=3steps$"),
    ('--helpconfig', r'^  --config\.optimizer\.learning_rate +float +'),
    ('--mode=eval', r'^eval \w+: '),
    ('--mode=predict', r'predictions_\w+_3\.npz: .* of [\d,]+ examples'),
    ('--mode=plan', r'^fits'),
    ("--match='Conv_", r'Conv_1'),
    ('--mode=export', r'model\.jax_export\(batch\) for '),
    ('--config.optimizer.learning_rate=0.1', r'^  train/learning_rate 0\.1$'),
    ('optimizer=\'{"momentum": 0.8', r'^  train/learning_rate 0\.01$'),
    (
        'mnist.py --config.optimizer.target=optax:adam',
        r'^config\.optimizer\.momentum dropped: optax:adam does not take it$',
    ),
    ('count=8 ', r'^devices +8 x cpu .*mesh '),
    ('"data": 2, "fsdp": 2, "model": 2', r'mesh data 2 x fsdp 2 x model 2$'),
    ('mine/config.py', r'confusion/counts int32\[10, 10\] in .*/metrics/eval_table_100\.npz$'),
    ('lm.py:bytes --config.model.scan_layers', r'^blocks/'),
    ('mnist_ensemble', r'^eval test at step 3: .*members'),
    ('mine/config.py', r'^eval sure at step 100: .*examples 77$'),
    ('mine/config.py', r'^hook: step 50 wrong [\d.]+$'),
    ('mine.mistakes', r'^eval test: .*errors \d+'),
    ('mine.mistakes', r'/summaries/3/eval/test/confused\.txt$'),
    ('mine.margins', r'/summaries/3/eval/test/unsure\.png$'),
    ('mine.unsure', r'/summaries/3/eval/test/unsure\.png$'),
    ('mine.streaming', r'^eval test: .*least_sure 0\.'),
    ('mine/brackets.py', r'^eval test at step 200: .* right 0\.99\d+  examples 200$'),
    ('mine/brackets.py', r'compiles for another shape of its batches \(3 of at most 3\)'),
    ('mine/colorings.py', r'^eval test at step 500: .* right 0\.9[89]\d*  examples 500$'),
    ('gan/', r'^  train/gen_loss '),
    ('sam.step', r'^  train/first_norm '),
    ('init_from.path', r'^starting from scratch, with weights from .*runs/(pretrained|digits|lm)'),
    ('transfer/digits', r'^starting from scratch, with weights from .*runs/pretrained'),
)


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Created once; each test runs the commands that it needs, unless they have run."""
    made = Project(tmp_path_factory.mktemp('project'))
    write_images(made.root / 'photos')
    return made


def test_the_pages_are_parsed_to_their_end() -> None:
    """The number of blocks found grows with the pages."""
    assert len(FILES) >= 22
    assert (QUICKSTART, TESTS) == ('launch/local.sh --config=configs/mnist.py', 'launch/test.sh')
    assert len([line for line in COMMANDS if is_of_trainer(line)]) >= 30
    assert len(OTHERS) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    'block', parameters(block for block in ALL_COMMANDS if is_of_trainer(block.text))
)
def test_command(block: Block, project: Project) -> None:
    line = block.text
    if re.search(r'wmt\.py(?!:numbers)', line):
        pytest.importorskip('sacrebleu', reason='needs the package sacrebleu')
    finished = project.run(line)
    words = [word for part, word in SAYS if part in line]
    if '--mode=' not in line and '--helpconfig' not in line:
        words.append(r'finished at step')
    assert words
    for word in words:
        assert re.search(word, finished.out + finished.err, flags=re.MULTILINE), word


@pytest.mark.parametrize(
    'block', parameters(block for block in ALL_COMMANDS if not is_of_trainer(block.text))
)
def test_command_of_another_program(block: Block, tmp_path: pathlib.Path) -> None:
    """Commands of launchers are checked, not run; the paths in commands of tools exist."""
    program, *words = shlex.split(block.text)
    if program == 'python' and words[0] in SCRIPTS:
        pass  # Run by `test_script`.
    elif program == 'python':
        text = (command.ROOT / words[0]).read_text()
        flags = [word.split('=')[0] for word in words if re.match(r'--\w', word)]
        assert [flag for flag in flags if flag not in text and '.' not in flag] == []
    elif program == 'launch/test.sh':
        assert set(words) <= {'--all'} or words[0].startswith('-') or words[0].startswith('tests/')
    elif program.startswith('launch/'):
        check_launcher(block.text, tmp_path)
    elif words[:1] == ['install'] and program == 'pip':
        extras = tomllib.loads((command.ROOT / 'pyproject.toml').read_text())
        named = re.findall(r'\[([\w,]+)\]', block.text)
        known = extras['project']['optional-dependencies']
        assert {name for names in named for name in names.split(',')} <= set(known)
    else:
        assert (program, *words) in (('mkdocs', 'serve'), ('mkdocs', 'build', '--strict')), (
            f'{block.page}:{block.line}: no test runs {block.text!r}; show it as text'
        )


@pytest.mark.slow
@pytest.mark.parametrize('page', dict.fromkeys(block.page for block in OTHERS))
def test_code_of_a_page(page: str) -> None:
    """Runs the code that is neither a file nor a fragment, from the top of the page to its end."""
    names = {'__name__': page}
    for block in OTHERS:
        if block.page == page:
            code = '\n' * (block.line - 1) + block.text
            exec(compile(code, f'{page}.md', 'exec', dont_inherit=True), names)


# The files that are programs, and the last line that each of them prints.
SCRIPTS = {
    'notebook.py': r"\{'test': \{.*'accuracy': .*\}\}",
    'full_evaluation.py': r'980 \[  980 10000\]',
    'generate.py': r'b[\'"].* b[\'"].*',
    'stream.py': r'(\d+ ){10}',
    'weights.py': r'\(64, 20\) \(64, 20\)',
    'features.py': r'0\.\d+',
    'call_exported.py': r'\(3,\)',
    'report.py': r'\d+ summaries',
    'vae_samples.py': r'\(100, 28, 28, 1\)',
    'judge.py': r'[01]\.\d\d I laughed .*',
    'my_molecules.py': r'[01]\.\d\d [\d.]+ OCC1OC.*',
    'tag_text.py': r'(\S+/[A-Z]+ ?){4}',
    'write_conllu.py': '3 files',
    'write_pairs.py': '16 pairs',
    'translate.py': r'seventy-six thousand one hundred and two -> .*',
    'write_text.py': '10000 lines',
    'prepare_digits.py': r"\{'train': 1000, 'test': 1000\}",
}


def require_packages(name: str) -> None:
    """Skips the test of a script that needs a package that is not installed."""
    if name == 'my_molecules.py':
        pytest.importorskip('rdkit', reason='needs the package rdkit')


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in FILES if '/' not in name])
def test_script(name: str, project: Project) -> None:
    require_packages(name)
    printed = project.script(name)
    assert re.fullmatch(SCRIPTS[name], printed.splitlines()[-1])
    if name == 'notebook.py':
        assert 'resuming from step 100' in printed
        assert 'finished' in printed
    if name == 'full_evaluation.py':  # On eight devices, by one program.
        assert re.search(r"'accuracy': 0\.0979+\d*, 'examples': 10000\b", printed)
        assert printed.count('compiled for') == 1
    if name == 'weights.py':
        assert printed.splitlines()[0] == '(64, 10)'
    if name == 'features.py':
        assert float(printed.splitlines()[-1]) > 0.5


def test_each_file_is_run() -> None:
    """A program is run itself, a file of a package by the commands and files that name it."""
    assert {name for name in FILES if '/' not in name} == set(SCRIPTS)
    for name in set(FILES) - set(SCRIPTS):
        named = (
            name,
            name.removesuffix('.py').replace('/', '.') + ':',
            f'from {name[:-3]}'.replace('/', '.'),
        )
        others = [*COMMANDS, *(block.text for block in FRAGMENTS)]
        others += [text for other, text in FILES.items() if other != name]
        assert any(word in text for text in others for word in named), name
