"""``python -m runlora_gen``."""

from .cli import run

run()
