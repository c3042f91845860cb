# SPDX-License-Identifier: Apache-2.0
"""One functional interface over module systems: what the step needs to know of a model."""
