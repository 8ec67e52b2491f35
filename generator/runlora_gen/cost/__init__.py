"""Prices: operations and programs as vectors of FLOPs, bytes, launches, memory, time and rounding error."""
