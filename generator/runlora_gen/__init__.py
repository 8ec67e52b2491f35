"""RunLoRA-gen: every way to compute a LoRA linear, priced; the best rendered as standalone torch modules."""

__version__ = "0.1.0"
