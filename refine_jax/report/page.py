"""Stub while the records are tried."""


def write_run_page(workdir):
    """Nothing yet."""
