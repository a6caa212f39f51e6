"""Build of refine_jax: `kernels/` at the top level installs as `refine_jax.kernels`."""

from setuptools import find_packages, setup

KERNELS = "refine_jax.kernels"

packages = find_packages(include=["refine_jax", "refine_jax.*"])
packages += [KERNELS] + [f"{KERNELS}.{name}" for name in find_packages("kernels")]

setup(
    package_data={
        "refine_jax.report": ["page.css", "page.js"],
        "refine_jax.small": ["*/*.json", "*/*.safetensors", "*/*.md"],
    },
    packages=packages,
    package_dir={"refine_jax": "refine_jax", KERNELS: "kernels"},
)
