# SPDX-License-Identifier: Apache-2.0
"""Devices: mesh, shardings, signals."""
