# SPDX-License-Identifier: Apache-2.0
"""Several members of one experiment, trained and evaluated by one program."""
