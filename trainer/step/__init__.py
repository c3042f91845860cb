# SPDX-License-Identifier: Apache-2.0
"""The train step: state, gradients, metrics, optimizers, random keys."""
