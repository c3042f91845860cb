# SPDX-License-Identifier: Apache-2.0
"""Models: plain Flax modules that know nothing of the trainer."""

import pkgutil

# A folder `models` of the user's without an `__init__.py` holds modules of this package too, after ours.
__path__ = pkgutil.extend_path(__path__, __name__)
