# SPDX-License-Identifier: Apache-2.0
"""Models: plain Flax modules that know nothing of the trainer."""

import pkgutil

# The modules of the user's own `models`, if it has no `__init__.py`, are found too, after ours.
__path__ = pkgutil.extend_path(__path__, __name__)
