# SPDX-License-Identifier: Apache-2.0
"""Builders that turn the sections of a config into objects.

The package is not called `trainer.build`, because `from trainer import build` imports a function.
"""
