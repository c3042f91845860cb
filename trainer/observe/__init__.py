# SPDX-License-Identifier: Apache-2.0
"""What a run shows and writes: metric rows, progress, tables, logs."""
