# SPDX-License-Identifier: Apache-2.0
"""The output of a run: metric files, summaries, progress, tables, logs and profiles."""
