"""What is written beside the steps of a run, `run.json` and `config.json`, and its digests.

Arrays have fingerprints; these files decide as much. A step is saved with the digests of what it
depends on: the model's config.json, its tokenizer, the place in the data. `run.json` is rewritten
at every start of the run, with the settings of then, so that its digest is in it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import json_field, kind_of, read_json, short, write_text
from refine_jax.checkpoint.folders import CONFIG, RUN, TOKENIZERS

_DIGEST = "digest"
FROZEN_FIX = "Put it back from a copy: the run has no other of the parameters it does not train."


class RunRecord(NamedTuple):
    """What run.json says.

    best_metric, best_mode: which checkpoint is best ("min" or "max" of a figure; None: none is).
    config: the configuration of the run. lora: rank, alpha and targets of its low-rank updates;
    None: there are none.
    """

    best_metric: str | None
    best_mode: str
    config: dict[str, Any]
    lora: dict[str, Any] | None = None


def write_run(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write run.json: JSON values, and their digest."""
    fields = json.loads(json.dumps(fields))
    text = json.dumps({_DIGEST: digest(fields)} | fields, indent=2) + "\n"
    write_text(Path(folder) / RUN, text)


def read_run(folder: Path, *, verify: bool = False) -> RunRecord:
    """What run.json says; every field of the right type.

    verify: also compare its digest. Versions before had none.

    Raises CheckpointError: it is missing, damaged, or (`verify`) not as it was written.
    """
    path = Path(folder) / RUN
    fields = read_json(path, CheckpointError)

    def get(name: str, kind: type, default: Any = None) -> Any:
        return json_field(fields, name, kind, where=path, error=CheckpointError, default=default)

    mode = get("best_mode", str, "min")
    if mode not in ("min", "max"):
        raise CheckpointError(f"{path}: best_mode must be 'min' or 'max'. Got: {short(mode)}.")
    written = get(_DIGEST, str)
    if verify and written not in (None, digest({k: fields[k] for k in fields if k != _DIGEST})):
        raise CheckpointError(
            f"{path} is not as the run wrote it: it was changed or damaged. Put it back from a "
            f'copy; if what it says is right, remove the line "{_DIGEST}" in it.'
        )
    return RunRecord(get("best_metric", str), mode, get("config", dict, {}), get("lora", dict))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in run.json, {section: {field: value}}, and its phase.

    Raises CheckpointError as `read_run` does, also where run.json is not as it was written, and for
    a section that is no object.
    """
    config = read_run(folder, verify=True).config
    for section, values in config.items():
        wanted = str if section == "phase" else dict
        if not isinstance(values, wanted):
            raise CheckpointError(
                f"{Path(folder) / RUN}: config.{section} must be {kind_of(wanted())}. "
                f"Got: {short(values)}."
            )
    return config


def digest(value: Any) -> str:
    """A digest of a JSON value: the same however it is written down."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digests(folder: Path) -> dict[str, str | None]:
    """Digests of the model's description in a folder, by file; None for one that is not there."""
    digests: dict[str, str | None] = {CONFIG: digest(read_json(folder / CONFIG, CheckpointError))}
    for name in TOKENIZERS:
        path = Path(folder) / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            digests[name] = None
            continue
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}.") from None
        digests[name] = hashlib.blake2b(content, digest_size=16).hexdigest()
    return digests
