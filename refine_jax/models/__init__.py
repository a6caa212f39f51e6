"""Fast-weight language models as pure functions: `forward`, `fork`, `extend`."""
