# SPDX-License-Identifier: Apache-2.0
"""What surrounds the loop: set-up, resume, events, checks, messages, and the work directory."""
