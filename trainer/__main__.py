# SPDX-License-Identifier: Apache-2.0
"""`python -m trainer ...` is `python -m trainer.main ...`."""

import runpy

# As a program, not by a call: the first lines of that file install signal handlers, before the
# imports that take seconds.
runpy.run_module('trainer.main', run_name='__main__', alter_sys=True)
