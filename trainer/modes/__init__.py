# SPDX-License-Identifier: Apache-2.0
"""What each `--mode` does. Importing this package imports no JAX."""
