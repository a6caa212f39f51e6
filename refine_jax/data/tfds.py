"""Data sets of tensorflow-datasets, without TensorFlow, and without importing what data names.

A prepared folder says in its JSON files which Python classes its features have and where its
records are, and tensorflow-datasets imports any module that it finds there. So every folder passes
`check_folder` before tensorflow-datasets sees it: data never runs code, nor reads files elsewhere.
"""

import contextlib
import difflib
import fnmatch
import hashlib
import importlib
import io
import json
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from refine_jax.base.errors import DataError, describe
from refine_jax.base.files import clean_text, json_field, local_path, parse_json, read_json, short
from refine_jax.config import DataConfig
from refine_jax.data.formats import TFDS_FEATURES, TFDS_INFO, is_tfds_folder

PREFIX = "tfds:"
CONNECT_SECONDS = 3.0  # within which a server must answer before a download is begun

_NAME = re.compile(
    r"(?P<name>[A-Za-z_]\w*)(/(?P<config>[\w+.-]*\w[\w+.-]*))?"
    r"(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?",
    re.ASCII,
)
_WORD = re.compile(r"[\w+.-]*\w[\w+.-]*")  # no path separator, and not only dots
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_TEMPLATE = re.compile(
    r"([\w+./-]|\$?\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\})*"
)
# tensorflow-datasets registers older builders only when it can import all of them, which needs
# packages that texts do not; these groups hold texts.
_TEXT_GROUPS = ("question_answering", "summarization", "text", "text_simplification", "translate")


class Opened(NamedTuple):
    """A split of a prepared data set.

    Attributes:
        builder: of tensorflow-datasets, with `info`.
        records: the examples by index, {feature: value}.
    """

    builder: Any
    records: Sequence[Mapping[str, Any]]


def open_tfds(
    source: str, split: str = "train", data_dir: str = "", setting: str = "data.source"
) -> Opened:
    """Open a split of a data set, and prepare the data set first if need be.

    source: a prepared folder, or a name: NAME, NAME/CONFIG, either with :VERSION. A name is one
        that tensorflow-datasets knows, or of a folder that is prepared in `data_dir`.
    split: e.g. "train" or "train[:10%]".
    data_dir: where tensorflow-datasets keeps its data; "" is its own default.
    setting: what the source was given as, for errors.

    Raises DataError: there is no such data set or split, it cannot be prepared, or a file of the
    folder asks for a class or a path that is none of its own.
    """
    folder = local_path(source, setting, DataError)
    with _one_message(source, split):
        if is_tfds_folder(folder):
            builder = _from_folder(folder)
        elif match := _NAME.fullmatch(source):
            builder = _from_name(match, _data_dir(data_dir), setting)
        elif folder.is_dir():
            names = (TFDS_INFO, TFDS_FEATURES)
            lacks = " and ".join(name for name in names if not (folder / name).is_file())
            raise DataError(
                f"{setting}={source!r} is no folder that tensorflow-datasets has prepared: it "
                f"lacks {lacks}. Name the folder of a version, e.g. {source}/1.0.0, or other data "
                f"as {setting}={str(folder)!r}."
            )
        else:
            raise DataError(
                f"{setting}={source!r} is neither a folder nor the name of a data set: NAME, "
                "NAME/CONFIG or NAME/CONFIG:1.0.0. Community data sets and arguments of builders "
                "are not supported."
            )
        return Opened(builder, TfdsExamples(builder, split))


class TfdsExamples(Sequence[Mapping[str, Any]]):
    """The examples of a split. Another process opens the folder again, and checks it again."""

    def __init__(self, builder: Any, split: str) -> None:
        """Open the split of tensorflow-datasets' builder."""
        self._folder, self._split = str(builder.data_path), split
        self._source = builder.as_data_source(split=split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return an example, {feature: value}."""
        return self._source[index]

    def __reduce__(self) -> tuple:
        """Pickle the name of the folder: what tensorflow-datasets pickles reads it unchecked."""
        return _open_records, (self._folder, self._split)


def _open_records(folder: str, split: str) -> TfdsExamples:
    with _one_message(folder, split):
        return TfdsExamples(_from_folder(Path(folder)), split)


@contextlib.contextmanager
def _one_message(source: str, split: str) -> Iterator[None]:
    """Turn whatever tensorflow-datasets raises into one line; builders may raise anything."""
    try:
        yield
    except DataError:
        raise
    except ModuleNotFoundError as error:
        raise DataError(
            f"tensorflow-datasets needs the package {error.name} to prepare {source!r}: install "
            "it, or prepare the data set elsewhere and name its folder."
        ) from error
    except Exception as error:
        raise DataError(
            f"tensorflow-datasets cannot read {source!r}, split {split!r}: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, cut where it is long."""
    lines = [line.strip() for line in describe(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _data_dir(data_dir: str) -> Path:
    path = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return local_path(path, "data.tfds_data_dir" if data_dir else "TFDS_DATA_DIR", DataError)


def _from_folder(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    check_folder(folder)
    return tfds.builder_from_directory(folder.absolute())


def _from_name(match: re.Match, data_dir: Path, setting: str) -> Any:
    """Build by a name that tensorflow-datasets knows, or from the folder of that name."""
    import tensorflow_datasets as tfds

    for group in _TEXT_GROUPS:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{group}")
    name, config, version = match["name"], match["config"], match["version"]
    names = tfds.list_builders(with_community_datasets=False)
    known = tfds.builder_cls(name) if name in names else None
    # As in tensorflow-datasets: code goes before files, unless it lacks what is asked for.
    if known is None or version or (config and config not in known.builder_configs):
        folder = _prepared(data_dir / name, config, version, match.string)
        if folder is not None:
            return _from_folder(folder)
    if known is None:
        near = difflib.get_close_matches(name, names, 3, cutoff=0.0)
        raise DataError(
            f"tensorflow-datasets cannot read {setting}={match.string!r}: it has no data set of "
            f"that name, and {data_dir} holds none that is prepared. Close to it: "
            f"{', '.join(near)}."
        )
    for info in sorted((data_dir / name).glob(f"**/{TFDS_INFO}")):
        check_folder(info.parent)
    builder = known(
        data_dir=str(data_dir), config=config, version=version, file_format="array_record"
    )
    if not is_tfds_folder(builder.data_dir):
        _check_reachable(name, builder.url_infos or {})
        logging.info("tensorflow-datasets prepares %s in %s", name, builder.data_dir)
        with contextlib.redirect_stdout(io.StringIO()):  # lines that repeat the error
            builder.download_and_prepare()
    return builder


def _prepared(root: Path, config: str | None, version: str | None, asked: str) -> Path | None:
    """Find the folder of the newest version in ROOT or ROOT/CONFIG; None if there is none."""
    base = root / config if config else root
    wanted = version or "*"
    folders = [
        path.parent
        for path in base.glob(f"*/{TFDS_INFO}")
        if _VERSION.fullmatch(path.parent.name) and fnmatch.fnmatchcase(path.parent.name, wanted)
    ]
    if folders:
        return max(folders, key=lambda path: [int(part) for part in path.name.split(".")])
    if not config:
        configs = sorted({path.parents[1].name for path in base.glob(f"*/*/{TFDS_INFO}")})
        if len(configs) == 1:
            return _prepared(root, configs[0], version, asked)
        if configs:
            raise DataError(
                f"{root} holds several configurations: name one, e.g. {PREFIX}{root.name}/"
                f"{configs[0]}. Got: {asked!r}, there are {short(', '.join(configs), 300)}."
            )
    return None


def _check_reachable(name: str, urls: Mapping[str, Any]) -> None:
    """Refuse a download from servers that do not answer; the downloader would try for minutes."""
    if urllib.request.getproxies():
        return
    hosts = sorted({urllib.parse.urlsplit(url).netloc for url in urls} - {""})
    if hosts and not any(_answers(host) for host in hosts[:2]):
        raise DataError(
            f"tensorflow-datasets must download {name!r} from {hosts[0]}, which does not answer: "
            "prepare it where there is internet, and give its folder or data.tfds_data_dir."
        )


def _answers(host: str) -> bool:
    """Whether a connection can be made; resolving a name has no time limit of its own."""
    done, answered = threading.Event(), threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError, ValueError):
            url = urllib.parse.urlsplit(f"//{host}")
            address = (url.hostname, url.port or 443)
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
            answered.set()
        done.set()

    threading.Thread(target=connect, daemon=True).start()
    done.wait(2 * CONNECT_SECONDS)
    return answered.is_set()


def check_folder(folder: Path) -> None:
    """Refuse a prepared folder whose files would import something, or lead out of the folder.

    Raises DataError: a feature whose class is none of tensorflow-datasets' own; a name or a file
    template with a path; a file that is not as tensorflow-datasets writes it.
    """
    path = folder / TFDS_INFO
    info = read_json(path, DataError)

    def field(fields: Mapping, name: str, kind: Any, default: Any) -> Any:
        """Read a field by the name that protocol buffers write, or by the one they define."""
        other = re.sub(r"[A-Z]", lambda letter: "_" + letter[0].lower(), name)
        name = name if fields.get(name) is not None else other
        return json_field(fields, name, kind, where=path, error=DataError, default=default)

    for name in ("name", "configName", "version", "fileFormat"):
        value = field(info, name, str, "")
        if value and not _WORD.fullmatch(value):
            raise DataError(f"{path}: {name} must be a plain name. Got: {short(value)}.")
    for split in field(info, "splits", list, []):
        if not isinstance(split, dict):
            raise DataError(f"{path}: splits must hold objects. Got: {short(split)}.")
        name = field(split, "name", str, "")
        template = field(split, "filepathTemplate", str, "")
        if not _WORD.fullmatch(name):
            raise DataError(f"{path}: a split must have a plain name. Got: {short(name)}.")
        parts = template.split("/")
        if not _TEMPLATE.fullmatch(template) or ".." in parts or template.startswith("/"):
            raise DataError(
                f"{path}: the files of split {name!r} must stand in the folder. Got: "
                f"filepathTemplate={short(template)}."
            )
    # Only there: the statistics beside it have types of their own.
    _check_features(field(info, "features", dict, {}), path)
    features = folder / TFDS_FEATURES
    if features.exists():
        _check_features(read_json(features, DataError), features)


def _check_features(fields: Mapping[str, Any], path: Path) -> None:
    """Look at every class that is named, also within texts that hold JSON."""
    allowed = _own_features()
    left: list[Any] = [fields]
    while left:
        value = left.pop()
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(child, dict | list):
                left.append(child)
            elif not isinstance(child, str):
                continue
            elif key in ("type", "pythonClassName", "python_class_name"):
                if child not in allowed:
                    raise DataError(
                        f"{path} names a class of features that is none of tensorflow-datasets' "
                        f"own; data is never imported. Got: {key}={short(child)}."
                    )
            elif key in ("json", "content"):
                left.append([parse_json(child, f"{path}: {key}", DataError)])
            elif key in ("names_file", "labels"):
                raise DataError(
                    f"{path}: labels must not come from another file. Got: {key}={short(child)}."
                )


def _own_features() -> set[str]:
    """List the full names of the features of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    home = "tensorflow_datasets.core.features."
    return {
        f"{kind.__module__}.{kind.__name__}"
        for kind in vars(tfds.features).values()
        if isinstance(kind, type)
        and issubclass(kind, tfds.features.FeatureConnector)
        and kind.__module__.startswith(home)
    }


class TfdsSource:
    """The text feature of a tensorflow-datasets data set, read without TensorFlow."""

    def __init__(self, options: DataConfig) -> None:
        """Open it, preparing it first if need be; raises DataError as `open_tfds`."""
        name, split = options.source.removeprefix(PREFIX), options.tfds_split
        builder, self._records = open_tfds(
            name, split, options.tfds_data_dir, options.setting("source")
        )
        feature = options.text_field
        features = sorted(builder.info.features or ())  # tfds gives them in any order
        if feature not in features:
            raise DataError(
                f"no feature {feature!r} in {builder.info.full_name}: set "
                f"{options.setting('text_field')} to one of {', '.join(features)}"
            )
        self._feature = feature
        self._name = builder.info.full_name
        with _one_message(name, split):
            files = sorted({part.filename for part in builder.info.splits[split].file_instructions})
            parts = [[os.path.basename(file), *_stamp(file)] for file in files]
        made_of = json.dumps([self._name, split, feature, len(self._records), parts])
        digest = hashlib.blake2b(made_of.encode(), digest_size=8).hexdigest()
        self.fingerprint = f"tfds-{digest}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        place = f"example {index} of {self._name}"
        with _one_message(place, self._feature):
            text = self._records[index][self._feature]
        try:
            return clean_text(text.decode("utf-8"))
        except (AttributeError, UnicodeDecodeError) as error:
            raise DataError(
                f"feature {self._feature!r}, {place}, is not UTF-8 text: {error}"
            ) from error


def _stamp(file: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
