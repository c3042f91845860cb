# SPDX-License-Identifier: Apache-2.0
"""Runs `python -m trainer ...` as `python -m trainer.main ...`."""

import runpy

# Run as a script, not imported: under `__main__` its first lines install signal handlers before the
# slow imports.
runpy.run_module('trainer.main', run_name='__main__', alter_sys=True)
