# SPDX-License-Identifier: Apache-2.0
"""CoNLL-U: words, what is not a word, and lines that are broken."""

from __future__ import annotations

import gzip
import pathlib

import pytest

from trainer.data import conllu

GERMAN = """\
# sent_id = 1
# text = Er geht zum Haus.
1\tEr\ter\tPRON\t_\t_\t2\tnsubj\t_\t_
2\tgeht\tgehen\tVERB\t_\t_\t0\troot\t_\t_
3-4\tzum\t_\t_\t_\t_\t_\t_\t_\t_
3\tzu\tzu\tADP\t_\t_\t5\tcase\t_\t_
4\tdem\tder\tDET\t_\t_\t5\tdet\t_\t_
4.1\tsehr\tsehr\tADV\t_\t_\t_\t_\t_\t_
5\tHaus\tHaus\tNOUN\t_\t_\t2\tobl\t_\tSpaceAfter=No
6\t.\t.\t_\t_\t_\t2\tpunct\t_\t_

# sent_id = 2
1\t#\t#\tSYM\t_\t_\t0\troot\t_\t_
"""


def read(path: pathlib.Path, text: str | bytes) -> list[conllu.Sentence]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return conllu.read(path)


def test_words_are_read_and_nothing_else(tmp_path: pathlib.Path) -> None:
    """Not multi-word tokens, nodes without a word, or comments; a word may be a '#'."""
    first, second = read(tmp_path / 'a.conllu', GERMAN)
    assert first.words == ('Er', 'geht', 'zu', 'dem', 'Haus', '.')
    assert first.tags == ('PRON', 'VERB', 'ADP', 'DET', 'NOUN', '')
    assert second == (('#',), ('SYM',))


def test_files_of_other_systems(tmp_path: pathlib.Path) -> None:
    """A mark of UTF-8, line ends of Windows, more empty lines, none at the end, compressed."""
    expected = read(tmp_path / 'a.conllu', GERMAN)
    windows = '\ufeff' + GERMAN.replace('\n\n', '\n\n\n').rstrip('\n').replace('\n', '\r\n')
    assert read(tmp_path / 'b.conllu', windows) == expected
    assert read(tmp_path / 'c.conllu.gz', gzip.compress(GERMAN.encode())) == expected


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('PRON\t_\t_', 'PRON\t_', r':3: 9 columns; expected 10, separated by tabs: ID, FORM'),
        ('PRON\t', 'PRON ', r":3: 9 columns; .* The line is '1\\tEr\\ter\\tPRON _"),
        ('2\tgeht', '3\tgeht', r":4: the ID is '3'; expected 2, the number of the word"),
        ('# sent_id = 2\n1', '5', r":12: the ID is '5'; expected 1"),
        ('2\tgeht', '2\t', r':4: the word \(FORM, column 2\) is empty'),
        ('1\tEr', 'x-y\tEr', r":3: the ID is 'x-y'; expected 1"),
    ],
)
def test_broken_lines_are_named(old: str, new: str, message: str, tmp_path: pathlib.Path) -> None:
    assert old in GERMAN
    with pytest.raises(ValueError, match=r'broken\.conllu' + message):
        read(tmp_path / 'broken.conllu', GERMAN.replace(old, new, 1))


def test_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r'latin\.conllu:2: expected text in UTF-8'):
        read(tmp_path / 'latin.conllu', GERMAN.replace('Er', 'Ü').encode('latin-1'))
    with pytest.raises(ValueError, match=r'none\.conllu cannot be read: .*No such file'):
        conllu.read(tmp_path / 'none.conllu')
    with pytest.raises(ValueError, match=r'a\.conllu\.gz cannot be read: Not a gzipped file'):
        read(tmp_path / 'a.conllu.gz', GERMAN)
    with pytest.raises(ValueError, match=r'a\.conllu is damaged: its content has sha256 \w+, not'):
        read(tmp_path / 'a.conllu', GERMAN)
        conllu.read(tmp_path / 'a.conllu', sha256='0')
