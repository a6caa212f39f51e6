"""What a compiled program costs on a TPU slice: memory, transfers, operations, time."""
