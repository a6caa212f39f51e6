"""Chunked fast-weight update kernels: arrays in, arrays out."""
