# SPDX-License-Identifier: Apache-2.0
"""What a run would need on devices that are not here: `--mode=plan`."""
