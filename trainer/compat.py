# SPDX-License-Identifier: Apache-2.0
"""Every reliance on private parts or message texts of a library, each in a function of its own.

Each function says which version it was checked with, why there is no public way, and what breaks
without it; tests/test_compat.py names the one that a new version breaks.
"""
