# SPDX-License-Identifier: Apache-2.0
"""Sources, transforms and loaders in numpy; they know nothing of the trainer."""

import pkgutil

# A folder `data` of the user's without an `__init__.py` holds modules of this package too, after ours.
__path__ = pkgutil.extend_path(__path__, __name__)
