"""The choice between vmap and a loop over the tasks."""

from metaimplicit.vectorization.choice import AutoVectorize, VmapChecks, lift

__all__ = ["AutoVectorize", "VmapChecks", "lift"]
