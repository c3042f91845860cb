# SPDX-License-Identifier: Apache-2.0
"""What mkdocs.yml cannot express: the path of the package for mkdocstrings, and unbroken flags."""

from __future__ import annotations

import atexit
import pathlib
import re
import shutil
import tempfile
from typing import Any

from mkdocs.plugins import event_priority

ROOT = pathlib.Path(__file__).resolve().parents[1]


@event_priority(100)  # Before mkdocstrings, which reads the setting.
def on_config(config: Any) -> Any:
    """Links the files of the package in the layout of a wheel, for mkdocstrings."""
    staging = pathlib.Path(tempfile.mkdtemp(prefix='docs-'))
    atexit.register(shutil.rmtree, staging, ignore_errors=True)
    package = staging / 'trainer'
    package.mkdir()
    for path in (ROOT / 'trainer').iterdir():
        if path.name not in ('models', 'data', '__pycache__'):
            (package / path.name).symlink_to(path, target_is_directory=path.is_dir())
    for name in ('models', 'data'):
        (package / name).mkdir()
        for path in [*(ROOT / name).iterdir(), ROOT / 'trainer' / name / '__init__.py']:
            if path.name != '__pycache__':
                (package / name / path.name).symlink_to(path, target_is_directory=path.is_dir())
    python = config.plugins['mkdocstrings'].config.handlers.setdefault('python', {})
    python['paths'] = [str(staging)]
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Marks the flags in sentences and tables: a browser would break a line after their dashes."""

    def mark(match: re.Match[str]) -> str:
        if match[0].startswith('<pre'):
            return match[0]
        return re.sub(r'(?<![\w-])--\w+', r'<span class="flag">\g<0></span>', match[0])

    return re.sub(r'<pre.*?</pre>|<code>.*?</code>', mark, html, flags=re.DOTALL)
