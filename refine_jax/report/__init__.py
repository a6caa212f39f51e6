"""What a run shows: its metrics file, progress, closing table, plots and page."""

from refine_jax.report.command import command, main

__all__ = ["command", "main"]
