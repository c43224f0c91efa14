"""The choice between vmap and a loop over the tasks."""

from metaimplicit.vectorization.choice import (
    AutoVectorize,
    VmapRecords,
    explain_objection,
    leave_comparison_to_caller,
    lift,
)

__all__ = [
    "AutoVectorize",
    "VmapRecords",
    "explain_objection",
    "leave_comparison_to_caller",
    "lift",
]
