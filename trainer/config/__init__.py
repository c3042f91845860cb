# SPDX-License-Identifier: Apache-2.0
"""Config files, overrides, durations and targets. Nothing here imports JAX."""
