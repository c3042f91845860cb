# SPDX-License-Identifier: Apache-2.0
"""Sources, transforms and loaders in numpy; they know nothing of the trainer."""

import os
import pkgutil

# The modules of the user's own folder `data` are found too, after ours. One with an `__init__.py`
# is another package: Python would run its modules without running that.
__path__[1:] = [
    folder
    for folder in pkgutil.extend_path(__path__, __name__)[1:]
    if not os.path.exists(os.path.join(folder, '__init__.py'))
]
