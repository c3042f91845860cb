# SPDX-License-Identifier: Apache-2.0
"""Weights of other worlds, brought into the names and shapes of a Flax model."""
