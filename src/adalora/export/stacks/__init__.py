"""What each serving stack does with an adapter: which ΔW it computes, or why it refuses."""

from adalora.export.stacks.registry import STACKS, Stack
from adalora.export.stacks.served import Effective, Refused, Served, read_served
from adalora.export.stacks.verifying import StackResult, check_forward, verify_adapter

__all__ = [
    "STACKS",
    "Effective",
    "Refused",
    "Served",
    "Stack",
    "StackResult",
    "check_forward",
    "read_served",
    "verify_adapter",
]
