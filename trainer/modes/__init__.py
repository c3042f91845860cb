# SPDX-License-Identifier: Apache-2.0
"""The implementation of each `--mode`. Importing this package imports no JAX."""
