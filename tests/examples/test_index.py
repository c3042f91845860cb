# SPDX-License-Identifier: Apache-2.0
"""The table of examples: each has a page, and a config with its result."""

from __future__ import annotations

import re

import pytest

from tests import command, pages
from tests.pages import PAGES
from trainer.config import loading

ROWS = pages.table('example', 'command', 'result', 'floor')


def test_each_page_has_a_row() -> None:
    linked = {re.findall(r'\((\w+)\.md\)', example)[0] for example, *_ in ROWS}
    # The files of `reinforce` are on the page itself.
    assert {f'docs/examples/{name}' for name in (*linked, 'index', 'reinforce')} == {
        name for name in PAGES if name.startswith('docs/examples/')
    }


@pytest.mark.parametrize(('example', 'line', 'result', 'floor', 'published'), ROWS)
def test_the_result_is_that_of_the_docstring(
    example: str, line: str, result: str, floor: str, published: str
) -> None:
    assert example and floor and published
    path = re.fullmatch(r'`python -m trainer\.main --config=(configs/\w+\.py)(:\w+)?`', line)
    assert path is not None
    text = ' '.join((command.ROOT / path[1]).read_text().split())
    assert line.strip('`') in text
    if result == 'not run yet':
        assert result in text
        return
    units = ' %| nats| bits| per word| BLEU| AUC| squared error| steps per'
    figure = re.match(rf'[\d.]+({units})', result)
    # A config with variants has a sentence for each.
    expected = text.split(f'`{path[2]}`: ' if f'`{path[2]}`: ' in text else 'Expected after ')[1]
    assert figure is not None and figure[0] in expected


def test_small_variants_exist() -> None:
    page = PAGES['docs/examples/index']
    variants = set(re.findall(r'`--config=(configs/\w+\.py:tiny)`', page.text))
    assert variants
    for variant in variants:
        loading.load(str(command.ROOT / variant))
