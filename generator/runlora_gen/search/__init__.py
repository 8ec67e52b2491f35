"""The choice: of one linear's programs, and of a whole model's over token counts."""
