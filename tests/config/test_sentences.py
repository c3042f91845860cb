# SPDX-License-Identifier: Apache-2.0
"""Every fixed key of a config has a sentence, which `--helpconfig` and the reference show."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from docs import generate
from tests.command import ROOT
from trainer.config import loading, schema, sections, sentences, show

SECTIONS = [
    value
    for value in vars(sections).values()
    if dataclasses.is_dataclass(value) and value.__module__ == sections.__name__
]


@pytest.mark.parametrize('section', SECTIONS)
def test_each_key_has_a_sentence(section: type) -> None:
    """And there are no sentences for other keys."""
    found = sentences.key_sentences(section)
    assert list(found) == list(schema.fields(section))
    for key, sentence in found.items():
        assert sentence.endswith('.') and '. ' not in sentence.rstrip('.'), key
        assert len(sentence) < 200, key
    assert sentences.summary(section).endswith('.')


def test_a_target_has_the_sentence_of_its_object() -> None:
    assert sentences.sentence_at(['model', 'target']) == sentences.sentence_at(['model'])
    assert sentences.sentence_at(['evals', 'test', 'every']) == sentences.sentence_at(
        ['evals', 'other', 'every']
    )
    assert sentences.sentence_at(['model', 'features']) == ''
    assert sentences.sentence_at(['optimizer', 'learning_rate']) == ''


def test_help_shows_the_sentences_within_100_columns() -> None:
    config = loading.to_plain(loading.load(str(ROOT / 'configs' / 'mnist.py')).config)
    lines = show.format_helpconfig(config).splitlines()
    assert max(map(len, lines)) <= 100
    [at] = [i for i, line in enumerate(lines) if '--config.data.remainder ' in line]
    text = ' '.join(line.strip() for line in lines[at + 1 : at + 3])
    assert text == sentences.sentence_at(['data', 'remainder'])


def test_the_list_of_all_keys_has_each_key_of_the_reference() -> None:
    lines = show.format_all_keys().splitlines()
    assert max(map(len, lines)) <= 100
    listed = re.findall(r'^  --config\.(\S+)', '\n'.join(lines), re.MULTILINE)
    assert sorted(listed) == sorted(
        re.findall(r'^### `(\S+)`', generate.config_page(), re.MULTILINE)
    )
    [at] = [i for i, line in enumerate(lines) if '--config.evals.<name>.every ' in line]
    assert lines[at].endswith("duration    '1 epoch'")
    assert lines[at + 1].strip() == sentences.sentence_at(['evals', 'test', 'every'])


@pytest.mark.parametrize('name', generate.PAGES)
def test_the_committed_page_is_up_to_date(name: str) -> None:
    """If not, run `python docs/generate.py`."""
    assert (ROOT / 'docs' / 'reference' / name).read_text() == generate.PAGES[name]()


def test_the_reference_has_every_key() -> None:
    text = ' '.join(generate.config_page().split())
    for section in SECTIONS:
        for key, sentence in sentences.key_sentences(section).items():
            assert re.search(rf'### `[\w.<>]*\b{key}` ', text), key
            assert sentence in text


def test_without_docstrings_there_are_no_sentences() -> None:
    """Under `python -OO`, which removes docstrings."""
    code = (
        'from trainer.config import sentences, sections\n'
        'print(dict(sentences.key_sentences(sections.DataSection)))'
    )
    done = subprocess.run(
        [sys.executable, '-OO', '-c', code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == '{}\n', done.stderr
