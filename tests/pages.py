# SPDX-License-Identifier: Apache-2.0
"""Parses the documentation pages: files, config fragments and commands, and how to run them.

The pages are README.md, launch/README.md and docs/**/*.md. On each of them

- ```` ```python ```` that begins with `# mine/model.py` is a file of one project that all pages
  share; with lines `c.x = ...` or `config.x = ...` it is a fragment of a config; everything else
  is run as it is, all such blocks of a page in one namespace.
  A fragment belongs in `configs/mnist_mlp.py`, or in the config that a comment right above
  it names: `<!-- configs/lm.py:bytes -->`.
- ```` ```py ```` is code of other libraries; only its syntax is checked.
- ```` ```bash ```` holds commands, one a line, run in the directory of that project.
- ```` ```text ```` is output, or a command with placeholders that a test of its own fills in.
- `--config.x=y` and `config.x = y` within a sentence are overrides and fragments, too.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import pytest

from tests import command

PATHS = [
    command.ROOT / 'README.md',
    command.ROOT / 'launch' / 'README.md',
    *sorted((command.ROOT / 'docs').rglob('*.md')),
]


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: the page's path from the root, without `.md`.
        line: the number of its first line, or 0.
        kind: the word after the fence: 'python', 'bash', 'text', ...
        text: the lines between the fences, without the fences' indentation.
        config: the config that a fragment belongs in, 'mnist_mlp.py' for example.
    """

    page: str
    line: int
    kind: str
    text: str
    config: str = 'mnist_mlp.py'


@dataclasses.dataclass(frozen=True)
class Page:
    """The blocks of a page, and its text without them."""

    path: pathlib.Path
    name: str
    text: str
    blocks: list[Block]
    sentences: str


def read(path: pathlib.Path) -> Page:
    """Parses a page."""
    name = path.relative_to(command.ROOT).as_posix().removesuffix('.md')
    text = path.read_text()
    blocks, sentences = [], []
    fence, start, inside = None, 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if fence is None and (found := re.match(r' *(```+) *(\w*)', line)):
            fence, start, inside = found, number + 1, []
        elif fence is not None and line.strip() == fence[1]:
            shown = textwrap.dedent('\n'.join(inside)) + '\n'
            above = next((line for line in reversed(sentences) if line.strip()), '')
            config = re.fullmatch(r'\s*<!-- configs/(\w+\.py(?::\w+)?) -->\s*', above)
            more = (config[1],) if config else ()
            blocks.append(Block(name, start, fence[2], shown, *more))
            fence = None
        else:
            (sentences if fence is None else inside).append(line)
    assert fence is None, f'{path}:{start}: the block has no end'
    return Page(path, name, text, blocks, '\n'.join(sentences) + '\n')


PAGES = {page.name: page for page in map(read, PATHS)}
README = PAGES['README']
BLOCKS = [block for page in PAGES.values() for block in page.blocks]


def _blocks(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


def _inline(pattern: str) -> list[Block]:
    """Returns the matches within sentences, once for each page."""
    found = [(page.name, m) for page in PAGES.values() for m in re.findall(pattern, page.sentences)]
    return [Block(page, 0, 'inline', text) for page, text in dict.fromkeys(found)]


def _commands() -> list[Block]:
    """Returns each line of the blocks of commands, without comments and line breaks."""
    found = []
    for block in _blocks('bash', 'sh'):
        for line in block.text.replace('\\\n', ' ').splitlines():
            text = re.sub(r'\s{2,}#.*', '', line).strip()
            if text and not text.startswith('#'):
                found.append(dataclasses.replace(block, text=text))
    return found


_NAMED = {
    block: match[1]
    for block in _blocks('python')
    if (match := re.match(r'# ([\w/]+\.py)\n', block.text))
}
FILES = {name: block.text for block, name in _NAMED.items()}
_IS_FRAGMENT = re.compile(r'^(c|config)\.', flags=re.MULTILINE)
_PIECES = [block for block in _blocks('python') if block not in _NAMED]
# Lines for a config file: blocks of them, and those within a sentence.
FRAGMENTS = [block for block in _PIECES if _IS_FRAGMENT.search(block.text)]
FRAGMENTS += _inline(r'`((?:c|config)\.[\w.]+ = [^`]+)`')
# Neither files nor fragments.
OTHERS = [block for block in _PIECES if block not in FRAGMENTS]
ALL_COMMANDS = _commands()
COMMANDS = list(dict.fromkeys(block.text for block in ALL_COMMANDS))
OVERRIDES = _inline(r'`(--config\.[^`]+=[^`]+)`')
TEXTS = [block.text.replace('\\\n', ' ') for block in _blocks('text')]

QUICKSTART, TESTS = [block.text for block in ALL_COMMANDS if block.page == 'README'][:2]
STEPS = 3
# Modes that read a checkpoint.
_READING = re.compile(r' --mode=(eval|predict|export)\b')


def parameters(blocks: Iterable[Block]) -> list[Any]:
    """Returns texts as test parameters, each once, with the page in the id."""
    first = {}
    for block in blocks:
        first.setdefault((block.text, block.config), block)
    return [
        pytest.param(block, id=f'{block.page}: {block.text.splitlines()[0]}')
        for block in first.values()
    ]


def table(*header: str) -> list[list[str]]:
    """Returns the cells of all rows of the tables whose header begins with these cells."""
    rows, found = [], 0
    for page in PAGES.values():
        within = False
        for line in page.sentences.splitlines():
            cells = [cell.strip() for cell in line.strip().strip('|').split('|')]
            if not line.startswith('|'):
                within = False
            elif [cell.strip('`') for cell in cells[: len(header)]] == list(header):
                within, found = True, found + 1
            elif within and not set(line) <= set('|-: '):
                rows.append(cells)
    assert found, f'no page has a table {header}'
    return rows


def is_of_trainer(line: str) -> bool:
    """Whether a command runs the trainer, directly or by a launcher."""
    return bool(re.match(r'(\w+=\S+ )*(python -m trainer(\.main)?|launch/local\.sh) ', line + ' '))


class Project:
    """A user's directory with the files of the pages, outside of the repository."""

    def __init__(self, root: pathlib.Path, python: str = sys.executable):
        """Writes the files.

        Args:
            root: the directory.
            python: runs commands and scripts: this one, with the checkout, or one with the wheel.
        """
        self.root = root
        self.python = python
        self._ran: dict[str, command.Finished] = {}
        for name, text in FILES.items():
            (root / name).parent.mkdir(exist_ok=True, parents=True)
            # The run that is exported is shorter here, and so is that of the language model.
            text = re.sub(r'\bexport_\d+', f'export_{STEPS}', text)
            text = text.replace('MNIST(split)', 'MNIST(split, limit=1000)')
            (root / name).write_text(text.replace("train_for='50 ", f"train_for='{STEPS} "))

    def run(self, line: str) -> command.Finished:
        """Runs a command of a page, once, after those that it needs."""
        if line not in self._ran:
            for other in needs(line):
                self.run(other)
            for script in _prepares(line):
                self.script(script)
            self._ran[line] = run(line, self.root, python=self.python)
            assert self._ran[line].code == 0, self._ran[line].err
        return self._ran[line]

    def script(self, name: str) -> str:
        """Returns what one of the files prints, after the commands that it needs."""
        for other in needs(FILES[name]):
            self.run(other)
        done = subprocess.run(
            [self.python, name],
            cwd=self.root,
            env=command.environment(self.python),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _prepares(text: str) -> list[str]:
    """Returns the scripts that write the datasets or the texts that a command reads."""
    written = [f"data_dir='{name}'" for name in re.findall(r'\.data_dir=(\w+)', text)]
    written += [f"'{name}'" for name in re.findall(r"=['\"]?([\w{}-]+\.(?:txt|conllu|tsv))", text)]
    return [name for name in FILES if any(each in FILES[name] for each in written)]


@functools.cache
def needs(text: str) -> tuple[str, ...]:
    """Returns the commands whose results a command, a file or a fragment reads."""
    found = []
    own = re.search(r'--workdir=(\S+)', text) if is_of_trainer(text) else None
    if is_of_trainer(text):
        for file in FILES:
            if file in text:
                found += needs(FILES[file])
        if _READING.search(text):
            # Data of its own that it reads does not make it another run.
            in_own = [x for x in COMMANDS if own and f'--workdir={own[1]}' in x.split()]
            training = [line for line in in_own if '--mode=' not in line]
            found.append(training[0] if training else _training_of(text))
    # Runs that a page names and a command makes.
    for directory in dict.fromkeys(re.findall(r'\bruns/\w+', text)):
        makers = [line for line in COMMANDS if f'--workdir={directory}' in line.split()]
        if own is None or own[1] != directory:
            found += [line for line in makers if '--mode=' not in line][:1]
        if f'{directory}/export_' in text:
            found += [line for line in makers if '--mode=export' in line][:1]
    return tuple(dict.fromkeys(line for line in found if line != text))


def _training_of(line: str) -> str:
    """Returns the command that trains what another mode reads, from a page if possible."""
    left_out = re.compile(r'--(mode|step|platforms)\b')
    words = tuple(word for word in _words(line) if not left_out.match(word))
    for other in COMMANDS:
        if is_of_trainer(other) and tuple(_words(other)) == words:
            return other
    return 'python -m trainer.main ' + shlex.join(words)


def _words(line: str) -> list[str]:
    """Returns the arguments of a command of the trainer."""
    words = shlex.split(line)
    while not words[0].startswith(('python', 'launch/')):
        words = words[1:]
    return words[3:] if words[0] == 'python' else words[1:]


def run(line: str, cwd: pathlib.Path, *more: str, python: str = sys.executable) -> command.Finished:
    """Runs a command of the trainer as shown, but with a shorter run and evaluation."""
    assert is_of_trainer(line), f'{line}: not a command of the trainer'
    args = [re.sub(r'^--step=\d+$', f'--step={STEPS}', word) for word in _words(line)]
    count = re.search(r'--xla_force_host_platform_device_count=(\d+)', line)
    config = re.search(r'--config=(?:configs/)?(\w+)(?:\.py)?(?::[\w,]+)?(?= |$)', line)
    name = config[1] if config else ''
    if 'helpconfig' not in line and '=mine/' not in line:
        args.append(f'--config.train_for={STEPS}steps')
    if name.startswith('lm') and 'mode=' not in line:
        args += ['--config.evals={}', '--config.model.layers=2']
    elif name == 'wmt' and ':numbers' not in line:
        args += ['--config.model.layers=1', '--config.model.width=16', '--config.precision=None']
        args.append('--config.data.batch_size=8')
    elif name == 'mnist_resnet':
        args.append('--config.evals={}')
    elif name.startswith('mnist') and 'evals={}' not in line:
        args.append('--config.evals.test.data.source.limit=1000')
    devices = int(count[1]) if count else 1
    return command.run(*args, *more, cwd=cwd, devices=devices, python=python)
