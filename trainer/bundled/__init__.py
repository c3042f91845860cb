# SPDX-License-Identifier: Apache-2.0
"""The models, data and configs that come with the trainer, whatever the user's own are called.

In a wheel they lie in this directory; in a checkout, two directories up.
"""

import pathlib

_here = pathlib.Path(__file__).parent
__path__ = [str(_here if (_here / 'models').is_dir() else _here.parents[1])]
