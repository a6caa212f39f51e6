"""`python -m refine_jax.report`: see `refine_jax.report.command`."""

import sys

from refine_jax.report.command import main

if __name__ == "__main__":
    sys.exit(main())
