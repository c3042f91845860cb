# SPDX-License-Identifier: Apache-2.0
"""What a model is asked to do with a batch, and the metrics of it."""
