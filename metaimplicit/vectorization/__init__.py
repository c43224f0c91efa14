"""The choice between vmap and a loop over the tasks."""

from metaimplicit.vectorization.choice import (
    AutoVectorize,
    VmapRecords,
    explain_objection,
    lift,
)

__all__ = ["AutoVectorize", "VmapRecords", "explain_objection", "lift"]
