"""What a model gains, and a whole step predicted: sums of prices, for ``explain`` and ``estimate``."""
