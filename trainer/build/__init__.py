# SPDX-License-Identifier: Apache-2.0
"""From the sections of a config to objects: one builder for each section."""
