# SPDX-License-Identifier: Apache-2.0
"""Ensembles: several members of one experiment, trained and evaluated by one program."""

from trainer.ensemble.step import member_state

__all__ = ['member_state']
