# SPDX-License-Identifier: Apache-2.0
"""Sources, transforms and loaders in numpy; they know nothing of the trainer."""

import pkgutil

# The modules of the user's own `data`, if it has no `__init__.py`, are found too, after ours.
__path__ = pkgutil.extend_path(__path__, __name__)
