# SPDX-License-Identifier: Apache-2.0
"""Looks inside a model while it trains: captures, the finite check, gradients of intermediates."""
