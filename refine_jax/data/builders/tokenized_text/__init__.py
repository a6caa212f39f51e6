"""Tokenised documents as ArrayRecord; run `python -m refine_jax.data.prepare --help`."""
