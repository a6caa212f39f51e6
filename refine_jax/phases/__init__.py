"""What a run does: one module a phase."""
