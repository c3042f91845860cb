# SPDX-License-Identifier: Apache-2.0
"""Tagged sentences as numbers: their splits, and words and tags that training does not have."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from trainer.data.tagged import SPLITS, TaggedSentences, list_tags, read_split, read_text


def conllu(*sentences: str) -> str:
    """Returns sentences such as 'a/X b/Y' as CoNLL-U."""
    lines = []
    for sentence in sentences:
        pairs = [word.split('/') for word in sentence.split()]
        lines += [f'{i}\t{w}\t_\t{t}' + 6 * '\t_' for i, (w, t) in enumerate(pairs, 1)]
        lines.append('')
    return '\n'.join(lines)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    """The pattern of files for three splits."""
    (tmp_path / 'de-train.conllu').write_text(conllu('der/DET Hut/NOUN', 'der/DET rote/ADJ'))
    (tmp_path / 'de-dev.conllu').write_text(conllu('der/DET Huß/NOUN', 'rote/_ der/DET'))
    (tmp_path / 'de-test.conllu').write_text(conllu('oh/INTJ'))
    return str(tmp_path / 'de-{split}.conllu')


def test_the_numbers_are_those_of_the_training_split(path: str) -> None:
    """Words are unknown that it has once, characters that it does not have."""
    dev = TaggedSentences('dev', path=path, word_length=3)
    assert len(dev) == 2
    example = dev[0]
    assert example['inputs']['words'].tolist() == [2, 1]
    # From the most frequent character on: e, r, d, t, H, u, o.
    assert example['inputs']['characters'].tolist() == [[4, 2, 3], [6, 7, 1]]
    assert example['tag'].tolist() == [list_tags(path).index(tag) for tag in ('DET', 'NOUN')]
    assert example['text'] == 'der\tHuß'
    assert dev[1]['inputs']['characters'].tolist() == [[8, 5, 2], [4, 2, 3]]
    assert dev[1]['tag'].tolist() == [-1, list_tags(path).index('DET')]


def test_the_number_of_ids_is_limited(path: str) -> None:
    source = TaggedSentences('train', path=path, max_words=4, max_characters=4, min_count=1)
    words = [source[i]['inputs']['words'].tolist() for i in range(2)]
    assert words == [[2, 3], [2, 1]]
    assert max(source[i]['inputs']['characters'].max() for i in range(2)) == 3


def test_other_numbers_have_another_checksum(path: str) -> None:
    """Those of words, characters and tags, which a trained model cannot do without."""
    before = TaggedSentences('dev', path=path).vocabulary
    assert before == TaggedSentences('train', path=path, limit=1).vocabulary
    train = pathlib.Path(path.replace('{split}', 'train'))
    for changed in ('der/DET der/DET Hut/NOUN Hut/NOUN', 'der/DET Hut/NOUN der/DET rote/X'):
        train.write_text(conllu(changed))
        assert TaggedSentences('dev', path=path).vocabulary != before


def test_a_limit_does_not_change_the_numbers(path: str) -> None:
    whole, limited = (TaggedSentences('train', path=path, limit=n) for n in (None, 1))
    assert (len(whole), len(limited)) == (2, 1)
    assert whole.lengths.tolist() == [2, 2] and limited.lengths.tolist() == [2]
    np.testing.assert_array_equal(
        whole[0]['inputs']['characters'], limited[0]['inputs']['characters']
    )


def test_a_tag_that_training_does_not_have(path: str) -> None:
    """It has a number and a name, the same in all splits."""
    assert list_tags(path) == ['ADJ', 'DET', 'INTJ', 'NOUN']
    tags = {split: TaggedSentences(split, path=path)[0]['tag'].tolist() for split in SPLITS}
    assert tags == {'train': [1, 3], 'dev': [1, 3], 'test': [2]}


def test_files_without_a_split_in_their_name(tmp_path: pathlib.Path) -> None:
    """Of ten sentences of each file, the ninth is in dev and the tenth in test."""
    for name, count in (('a', 12), ('b', 10)):
        (tmp_path / f'{name}.conllu').write_text(conllu(*(f'{name}{i}/X' for i in range(count))))
    found = {
        split: [s.words[0] for s in read_split(split, str(tmp_path / '*.conllu'))]
        for split in ('train', 'dev', 'test')
    }
    assert found['dev'] == ['a8', 'b8'] and found['test'] == ['a9', 'b9']
    assert found['train'][6:10] == ['a6', 'a7', 'a10', 'a11'] and len(found['train']) == 18


def test_the_treebank() -> None:
    """The documented numbers of sentences, words and tags; the content is checked."""
    sizes = {split: read_split(split) for split in ('train', 'dev', 'test')}
    assert [len(x) for x in sizes.values()] == [3881, 485, 485]
    assert [sum(len(s.words) for s in x) for x in sizes.values()] == [64707, 8638, 8025]
    assert list_tags() == [
        'ADJ', 'ADP', 'ADV', 'AFFIX', 'CONJ', 'DET', 'NOUN', 'NUM', 'ONOM', 'PRON', 'PRT', 'PUNCT',
        'VERB', 'X',
    ]  # fmt: skip


def test_plain_text(tmp_path: pathlib.Path, path: str) -> None:
    text = tmp_path / 'mine.txt'
    text.write_text("Ankara'da 3,5 milyon (%25'i) yok!\n\nder Hut\n")
    first, second = read_text(str(text))
    assert first.words == ("Ankara'da", '3,5', 'milyon', '(', '%', "25'i", ')', 'yok', '!')
    assert second.tags == ('', '')
    source = TaggedSentences('test', path=path, text=str(text))
    assert source[1]['inputs']['words'].tolist() == [2, 1]
    assert source[1]['tag'].tolist() == [-1, -1]


@pytest.mark.parametrize(
    'words',
    [
        'Evet ... -- :) ;-) :D :( :S',
        "1980lerde 3D 3G'ye 2008'de 3,5 12:30",
        "`` Ali'nin kedisi ''",
        'saat : Sabah - akşam ( 5 )',
    ],
)
def test_plain_text_has_the_words_of_the_treebank(words: str, tmp_path: pathlib.Path) -> None:
    text = tmp_path / 'mine.txt'
    text.write_text(words)
    assert read_text(str(text))[0].words == tuple(words.split())


def test_characters_of_plain_text(tmp_path: pathlib.Path) -> None:
    """Without the byte order mark of some editors; a letter and its accent are one character."""
    text = tmp_path / 'mine.txt'
    text.write_text('\ufeffgu\u0308zel(:))...', encoding='utf-8')
    assert read_text(str(text))[0].words == ('güzel', '(', ':)', ')', '...')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'split': 'valid'}, "split: 'valid' is none of train, dev, test"),
        ({'path': 'nowhere/*.conllu'}, r"path: no file 'nowhere/\*\.conllu', relative to /"),
        ({'text': 'nowhere.txt'}, r'text: nowhere\.txt cannot be read'),
        ({'max_words': 2}, 'max_words=2, .* expected at least 3 ids'),
        ({'limit': 0}, r"there are no sentences in the split 'dev'"),
    ],
)
def test_arguments_that_are_refused(changes: dict[str, Any], message: str, path: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaggedSentences(**{'split': 'dev', 'path': path, **changes})
