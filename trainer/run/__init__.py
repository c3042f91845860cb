# SPDX-License-Identifier: Apache-2.0
"""A run around its loop: setup, resume, events, checks, messages, and the work directory."""
