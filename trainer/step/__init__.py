# SPDX-License-Identifier: Apache-2.0
"""What happens inside a step: state, tasks, metrics, optimizers, random keys."""
