"""What a run needs of a TPU slice, found by compiling it ahead of time where there is no TPU."""
