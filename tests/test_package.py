"""`kernels/` is `refine_jax.kernels`, from a clone installed editable and from a wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "refine_jax", "kernels")

REPORT = """
import sys
sys.path[:0] = sys.argv[1:]
import refine_jax, refine_jax.kernels.delta_rule, refine_jax.kernels.lact
print(refine_jax.__file__)
print(refine_jax.kernels.delta_rule.__file__)
print(refine_jax.kernels.lact.__file__)
"""


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def modules(folder: Path) -> set[str]:
    """Module files under a folder, by their path relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_an_installed_clone_imports_its_own_kernels(tmp_path):
    """From another folder, so that only the installation can have made it importable."""
    package, delta_rule, lact = python("-c", REPORT, cwd=tmp_path).split()
    if Path(package) != ROOT / "refine_jax" / "__init__.py":
        pytest.skip(f"another refine_jax is installed: {package}")
    assert Path(delta_rule) == ROOT / "kernels" / "delta_rule" / "__init__.py"
    assert Path(lact) == ROOT / "kernels" / "lact" / "__init__.py"


def test_a_wheel_holds_all_modules_and_imports(tmp_path):
    # From a copy: setuptools leaves a build folder, whose old files later wheels would contain.
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    wheel = python("-c", build, str(tmp_path), cwd=clone).split()[-1]

    installed = tmp_path / "installed"
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        archive.extractall(installed)
    tops = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"refine_jax"}
    small = {path.name for path in (installed / "refine_jax" / "small" / "deltanet").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= small
    for name in ("page.css", "page.js"):
        assert (installed / "refine_jax" / "report" / name).is_file()
    assert modules(installed / "refine_jax" / "kernels") == modules(ROOT / "kernels")
    own = {name for name in modules(installed / "refine_jax") if not name.startswith("kernels")}
    assert own == modules(ROOT / "refine_jax")

    imported = python("-I", "-c", REPORT, str(installed), cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(installed) for file in imported), imported


def test_training_starts_without_what_extras_bring(tmp_path):
    """However much is installed, nothing of it is imported before it is needed."""
    code = "import sys, refine_jax.main, refine_jax.phases.midtrain; print(*sys.modules)"
    extras = {"gcsfs", "huggingface_hub", "lm_eval", "mlflow", "tensorboard", "torch"}
    extras |= {"trackio", "transformers", "wandb", "xprof"}
    assert not extras & {*python("-c", code, cwd=tmp_path).split()}
