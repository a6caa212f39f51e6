"""Where the golden data is, and how tests read it.

The folder is `$REFINE_GOLDEN`, by default `../shared/golden` beside the repository. Its parts are
found by what they hold, not by name: other folders of the same structure (other seeds, shapes,
variants) run through the same tests.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("REFINE_GOLDEN") or ROOT.parent / "shared" / "golden")
INPUTS = Path(os.environ.get("REFINE_INPUTS") or ROOT.parent / "shared" / "inputs")


def _require(path: Path, what: str, variable: str) -> Path:
    if not path.exists():
        pytest.skip(f"{what} not found: {path} (set {variable})")
    return path


def require(*parts: str) -> Path:
    """Path of a file or folder of the golden data; skips the calling test where it is absent."""
    return _require(GOLDEN.joinpath(*parts), "golden data", "REFINE_GOLDEN")


def load_arrays(*parts: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz file by name."""
    with np.load(require(*parts)) as file:
        return {name: file[name] for name in file.files}


def load_json(*parts: str):
    """Content of a .json file."""
    return json.loads(require(*parts).read_text())


def folders_with(*files: str) -> list[str]:
    """Names of the golden folders that hold all of `files`, sorted; none where data is absent."""
    if not GOLDEN.is_dir():
        return []
    return sorted(
        folder.name
        for folder in GOLDEN.iterdir()
        if folder.is_dir() and all((folder / file).exists() for file in files)
    )


def model_folders() -> list[str]:
    """Names of the model folders: those with a config, weights and expected outputs."""
    return folders_with("config.json", "model.safetensors", "expected.npz")


def subtree(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Entries `prefix/name` of `arrays` as {name: array}."""
    return {
        name.removeprefix(prefix + "/"): array
        for name, array in arrays.items()
        if name.startswith(prefix + "/")
    }


def require_input(*parts: str) -> Path:
    """Path of one of the inputs as people have them; skips the calling test where it is absent."""
    return _require(INPUTS.joinpath(*parts), "input", "REFINE_INPUTS")
