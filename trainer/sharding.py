# SPDX-License-Identifier: Apache-2.0
"""Rules for `config.sharding`: they map dimensions of parameters to mesh axes.

A custom rule is any object with the method of `Rule`, which receives a `Parameter`.
"""

from trainer.parallel.sharding import FSDP, ByName, ByPath, Parameter, Replicated, Rule

__all__ = ['FSDP', 'ByName', 'ByPath', 'Parameter', 'Replicated', 'Rule']
