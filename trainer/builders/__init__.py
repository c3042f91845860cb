# SPDX-License-Identifier: Apache-2.0
"""One builder for each section of a config; `trainer.experiment.build` calls them.

Not `trainer.build`: that is the function, which `from trainer import build` imports.
"""
