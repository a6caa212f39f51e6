"""ReFINE: next-sequence reinforcement learning for fast-weight language models, in JAX."""
