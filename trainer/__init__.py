# SPDX-License-Identifier: Apache-2.0
"""Train Flax models from `ml_collections` configs. Importing this package imports no JAX."""
