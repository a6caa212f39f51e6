"""What a run shows: its metrics file, progress, closing table and plots."""
