"""The fused kernels: one folder each, with its record and its templates."""
