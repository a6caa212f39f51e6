"""tensorflow-datasets builders of this package."""
