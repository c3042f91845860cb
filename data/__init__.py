# SPDX-License-Identifier: Apache-2.0
"""Sources, transforms and loaders in numpy; they know nothing of the trainer."""
