# SPDX-License-Identifier: Apache-2.0
"""Regenerates the golden texts of all configs: python tests/config/regenerate.py"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.config import loading, show  # noqa: E402

for path in sorted((ROOT / 'configs').glob('*.py')):
    if path.name != '__init__.py':
        text = show.format_resolved(loading.to_plain(loading.load(str(path)).config), ())
        (ROOT / 'tests' / 'config' / 'golden' / f'{path.stem}.txt').write_text(text + '\n')
