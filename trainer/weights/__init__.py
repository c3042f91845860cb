# SPDX-License-Identifier: Apache-2.0
"""Starting from other weights: where they lie, what is done to them, where they go."""
