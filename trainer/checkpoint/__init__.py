# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: saving and restoring the training state with Orbax."""
