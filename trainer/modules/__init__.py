# SPDX-License-Identifier: Apache-2.0
"""A functional interface over the module systems of Flax: Linen, NNX and Klinen."""
