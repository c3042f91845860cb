# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: mesh, shardings, connections between processes, signals."""
