# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, and its search finds pages."""

from __future__ import annotations

import functools
import http.server
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from tests import browser
from tests.command import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The site, built as `launch/test.sh --all` builds it."""
    directory = tmp_path_factory.mktemp('site')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', f'--site-dir={directory}'],
        cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return directory


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""


@pytest.fixture(scope='module')
def address(site: pathlib.Path) -> Iterator[str]:
    """Returns the address at which the site is served."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


# What a reader types, and the heading of a page that answers it.
QUESTIONS = (
    ('how is the code organized', 'How the code is organized'),
    ('several devices', 'How do I train on several devices?'),
    ('start from other weights', 'How do I start from other weights?'),
    ('data.batch_size', 'Config keys'),
    ('exit codes', 'Command line'),
    ('coming from keras', 'Coming from Keras'),
)


@pytest.mark.skipif(browser.PROGRAM is None, reason='needs the package chromium')
@pytest.mark.parametrize(('question', 'heading'), QUESTIONS)
def test_the_search_finds_a_page(question: str, heading: str, address: str) -> None:
    with browser.Browser() as page:
        page.open(f'{address}/')
        page.value("document.querySelector('input.md-search__input').focus()")
        page.type(question)
        page.wait_for("document.querySelector('.md-search-result__item a')")
        first = "document.querySelector('.md-search-result__item a')"
        title = f"{first}.querySelector('h1, h2').textContent"
        page.wait_for(f'{title}.includes({heading!r})')
        page.value(f'{first}.click()')
        page.wait_for("document.querySelector('h1') !== null && location.hash !== '#__search'")
        page.wait_for(f"document.querySelector('h1').textContent.includes({heading!r})")
        assert page.value('location.pathname') != '/'
        hosts = {urllib.parse.urlsplit(url).hostname for url in page.requests}
    assert hosts <= {'127.0.0.1', None, ''}
    assert f'{address}/search/search_index.json' in page.requests


@pytest.mark.skipif(browser.PROGRAM is None, reason='needs the package chromium')
@pytest.mark.parametrize('width', [1280, 400])
def test_no_page_is_wider_than_the_window(width: int, address: str, site: pathlib.Path) -> None:
    """Code and tables scroll by themselves, no flag is broken, and every page has one title."""
    paths = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob('index.html'))
    assert len(paths) > 10
    flags = 0
    broken = (
        "[...document.querySelectorAll('.md-content .flag')]"
        '.filter(flag => flag.getClientRects().length > 1).length'
    )
    with browser.Browser(width) as page:
        for path in paths:
            page.open(f'{address}/' if path == '.' else f'{address}/{path}/')
            assert page.value('document.documentElement.scrollWidth') <= width, path
            assert page.value("document.querySelectorAll('h1').length") == 1, path
            assert page.value(broken) == 0, path
            flags += page.value("document.querySelectorAll('.flag').length")
    assert flags > 10
