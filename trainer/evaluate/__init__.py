# SPDX-License-Identifier: Apache-2.0
"""Evaluation of whole splits: every example exactly once."""
