# SPDX-License-Identifier: Apache-2.0
"""`--mode=plan`: estimates the memory, FLOPs and traffic of a step on virtual devices."""
