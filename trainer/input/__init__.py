# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the devices, and the position of a run in its data."""
