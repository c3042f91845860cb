# SPDX-License-Identifier: Apache-2.0
"""Rules for `config.sharding`: which dimension of a parameter is split over which mesh axis.

A rule of your own is any object with the method of `Rule`; it is given a `Parameter`.
"""

from trainer.parallel.sharding import FSDP, ByName, ByPath, Parameter, Replicated, Rule

__all__ = ['FSDP', 'ByName', 'ByPath', 'Parameter', 'Replicated', 'Rule']
