# SPDX-License-Identifier: Apache-2.0
"""Models: plain Flax modules that know nothing of the trainer."""
