# SPDX-License-Identifier: Apache-2.0
"""Input: from a loader to batches on the devices, and the position of a run in its data."""
