"""Data sets of tensorflow-datasets: texts as written, one message for faults, no imports."""

import importlib.util
import json
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from corpora import data_config

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.config import DataConfig
from refine_jax.data import load_corpus, open_source
from refine_jax.data.prepare import prepare
from refine_jax.data.tfds import open_tfds
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.data.tokens import open_tokens

TEXTS = ["alpha", "", "gämma", *("x" * n for n in range(1, 40))]
OWN = "tensorflow_datasets.core.features"
PLANTED = "planted_features"


class Letters(tfds.core.GeneratorBasedBuilder):
    """A data set with text, as tensorflow-datasets has many."""

    name = "letters"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "story": tfds.features.Text(),
                "label": tfds.features.Scalar(np.int32),
                "type": tfds.features.ClassLabel(names=["a", "b"]),
                "words": tfds.features.Sequence(tfds.features.Text()),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, text in enumerate(TEXTS):
            yield i, {"story": text, "label": i, "type": i % 2, "words": ["one", "two"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A prepared data set; tests change copies of it."""
    folder = tmp_path_factory.mktemp("letters")
    builder = Letters(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_dir=str(folder / "downloads"))
    return Path(builder.data_dir)


@pytest.fixture
def letters(made: Path, tmp_path: Path) -> Path:
    """The data set under a data_dir of its own: DATA_DIR/letters/1.0.0."""
    folder = tmp_path / "data" / "letters" / "1.0.0"
    shutil.copytree(made, folder)
    return folder


def options_of(source: object, **changes) -> DataConfig:
    values = {"tokenizer": "bytes", "sequence_length": 16, "min_tokens": 1, "text_field": "story"}
    return data_config(source=str(source), **{**values, **changes})


def change(path: Path, edit: Callable[[dict], Any]) -> None:
    """Edit the object of a JSON file."""
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def test_text_source(letters: Path) -> None:
    for name in (letters, f"tfds:{letters}"):
        source = open_source(options_of(name))
        assert [source[i] for i in range(len(source))] == TEXTS
    part = open_source(options_of(letters, tfds_split="train[:4]"))
    assert [part[i] for i in range(len(part))] == TEXTS[:4]
    assert part.fingerprint != source.fingerprint
    by_name = options_of("tfds:letters", tfds_data_dir=str(letters.parents[1]))
    assert open_source(by_name)[2] == TEXTS[2]
    with pytest.raises(DataError, match=r"no feature 'text'.*label, story"):
        open_source(options_of(letters, text_field="text"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        open_source(options_of(letters, text_field="label"))[0]
    with pytest.raises(DataError, match="split 'test'"):
        open_source(options_of(letters, tfds_split="test"))


def test_home_is_expanded(letters: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(letters.parents[2]))
    assert open_source(options_of("~/data/letters/1.0.0"))[0] == TEXTS[0]
    assert open_source(options_of("tfds:~/data/letters/1.0.0"))[0] == TEXTS[0]
    assert open_source(options_of("tfds:letters", tfds_data_dir="~/data"))[0] == TEXTS[0]


def test_a_prepared_folder_is_found_by_its_name_without_code(letters: Path) -> None:
    """As it is after another machine prepared it: no builder of that name is registered here."""
    root = letters.parents[1]
    for folder in ("others/1.0.0", "others/1.10.0", "pairs/small/1.0.0"):
        shutil.copytree(letters, root / folder)
        name = folder.split("/")[0]
        change(root / folder / "dataset_info.json", lambda x, name=name: x.update(name=name))
        version = folder.rsplit("/", 1)[1]
        change(root / folder / "dataset_info.json", lambda x, v=version: x.update(version=v))
        for path in (root / folder).glob("letters-*"):
            path.rename(path.with_name(path.name.replace("letters", name)))

    def found(name: str) -> str:
        return open_tfds(name, data_dir=str(root)).builder.info.full_name

    assert found("others") == "others/1.10.0"
    assert found("others:1.0.0") == "others/1.0.0"
    assert found("others:1.0.*") == "others/1.0.0"
    assert found("pairs").startswith("pairs/")
    assert found("pairs/small").startswith("pairs/")
    shutil.copytree(root / "pairs/small", root / "pairs/large")
    with pytest.raises(DataError, match=r"name one, e\.g\. tfds:pairs/large"):
        found("pairs")


# How the files of a folder can name a class. `x` is a feature that names it.
FORMS: dict[str, Callable[[dict], dict]] = {
    "at the top": lambda x: x,
    "in a feature": lambda x: _features({"story": x}),
    "in a sequence": lambda x: _features({"story": _own("sequence_feature.Sequence", x)}),
    "in JSON": lambda x: {
        "pythonClassName": f"{OWN}.features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps({"story": x})},
    },
    "in JSON in JSON": lambda x: {
        "type": f"{OWN}.features_dict.FeaturesDict",
        "content": json.dumps({"features": {"story": x}}),
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    },
    "in the old form": lambda x: {
        "type": f"{OWN}.features_dict.FeaturesDict",
        "content": {"story": x},
    },
}
CLASSES = {
    "pythonClassName": {"pythonClassName": f"{PLANTED}.Text", "text": {}},
    "python_class_name": {"python_class_name": f"{PLANTED}.Text", "text": {}},
    "type": {"type": f"{PLANTED}.Text", "content": {}},
    "a package of its own": {"pythonClassName": f"{PLANTED}.core.features.Text", "text": {}},
    "a name like theirs": {"type": f"{OWN}.{PLANTED}.Text", "content": {}},
}


def _features(features: dict) -> dict:
    return {
        "pythonClassName": f"{OWN}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def _own(name: str, inner: dict) -> dict:
    return {"pythonClassName": f"{OWN}.{name}", "sequence": {"feature": inner, "length": "-1"}}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch) -> Path:
    """A module in the current directory that leaves a file when it is imported: that file."""
    ran = tmp_path / "ran"
    work = tmp_path / "work"
    work.mkdir()
    (work / f"{PLANTED}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend("")  # as `python -m` has it
    assert importlib.util.find_spec(PLANTED)
    yield ran
    sys.modules.pop(PLANTED, None)


def ways_in(folder: Path) -> list[Callable[[], Any]]:
    """Every way to open a prepared folder DATA_DIR/NAME/VERSION."""
    by_name = {"tfds_data_dir": str(folder.parents[1])}
    sources = [
        options_of(folder),
        options_of(f"tfds:{folder}"),
        options_of(f"tfds:{folder.parent.name}", **by_name),
        options_of(f"tfds:{folder.parent.name}:{folder.name}", **by_name),
    ]
    return [
        *(lambda options=options: open_source(options) for options in sources),
        lambda: load_corpus(sources[0]),
        lambda: prepare(sources[0], str(folder.parents[2] / "out")),
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CLASSES)
def test_data_imports_nothing(letters: Path, planted: Path, form: str, kind: str) -> None:
    (letters / "features.json").write_text(json.dumps(FORMS[form](CLASSES[kind])))
    for name in ("letters", "unregistered"):  # with a builder of that name, and without
        folder = letters.parents[1] / name / "1.0.0"
        if folder != letters:
            shutil.copytree(letters, folder)
        for way in ways_in(folder):
            with pytest.raises(DataError, match=r"features\.json names a class .* own; data is"):
                way()
            assert not planted.exists()


def test_description_of_a_data_set_imports_nothing(letters: Path, planted: Path) -> None:
    info = letters / "dataset_info.json"
    change(info, lambda x: x.update(moduleName=PLANTED))
    for way in ways_in(letters):
        way()
        assert not planted.exists()
    change(info, lambda x: x.update(features=FORMS["in a feature"](CLASSES["pythonClassName"])))
    for way in ways_in(letters):
        with pytest.raises(DataError, match=r"dataset_info\.json names a class"):
            way()
        assert not planted.exists()


def test_statistics_beside_the_features_are_no_classes(letters: Path) -> None:
    schema = {"feature": [{"name": "story", "type": "BYTES"}]}
    change(letters / "dataset_info.json", lambda x: x.update(schema=schema))
    assert open_source(options_of(letters))[0] == TEXTS[0]


def test_tokenised_records_import_nothing(tmp_path: Path, planted: Path) -> None:
    (tmp_path / "a.txt").write_text("some text of a document")
    made = prepare(options_of(tmp_path / "a.txt"), str(tmp_path / "out"))
    folder = Path(made["folder"])
    wrong = FORMS["at the top"](CLASSES["pythonClassName"])
    (folder / "features.json").write_text(json.dumps(wrong))
    with pytest.raises(DataError, match="names a class"):
        load_corpus(options_of(folder))
    with pytest.raises(DataError, match="tokenised already"):
        prepare(options_of(folder), str(tmp_path / "again"))
    assert not planted.exists()


def test_reader_processes_import_nothing(letters: Path, tmp_path: Path, planted: Path) -> None:
    """They open the folder again; it may have been exchanged since this process looked at it."""
    texts = open_source(options_of(letters))
    prepared = Path(prepare(options_of(letters), str(tmp_path / "out"))["folder"])
    options = options_of(prepared)
    tokens = open_tokens(options, load_tokenizer(options.tokenizer))
    sent = {letters: pickle.dumps(texts), prepared: pickle.dumps(tokens)}
    assert pickle.loads(sent[letters])[0] == texts[0] == TEXTS[0]
    np.testing.assert_array_equal(pickle.loads(sent[prepared]).read(0, 0, 9), tokens.read(0, 0, 9))
    wrong = FORMS["at the top"](CLASSES["pythonClassName"])
    for folder, message in sent.items():
        (folder / "features.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"features\.json names a class .* own; data is"):
            pickle.loads(message)
        assert not planted.exists()


@pytest.mark.parametrize(
    "name",
    [
        PLANTED,
        f"{PLANTED}.Builder",
        f"{PLANTED}:letters",
        f"{PLANTED}/config",
        f"{PLANTED}:1.0.0",
        f"./{PLANTED}",
        f"../elsewhere/{PLANTED}.py",
        "huggingface:squad",
        "kubric:movi",
        "letters/a=1",
        "letters/..",
        "letters/../letters",
        "letters/1.0.0/version=1.0.0",
        "",
    ],
)
def test_names_import_nothing(letters: Path, planted: Path, name: str) -> None:
    started = time.perf_counter()
    with pytest.raises((ConfigError, DataError)) as caught:
        open_source(options_of(f"tfds:{name}", tfds_data_dir=str(letters.parents[1])))
    assert len(str(caught.value).splitlines()) == 1
    assert time.perf_counter() - started < 5
    assert not planted.exists()


def _split(**fields) -> Callable[[dict], Any]:
    return lambda info: info["splits"][0].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_split(filepathTemplate="../{DATASET}-{SPLIT}.x"), "must stand in the folder"),
        (_split(filepathTemplate="/etc/{SPLIT}"), "must stand in the folder"),
        (_split(filepathTemplate="a/../../{SPLIT}"), "must stand in the folder"),
        (_split(filepathTemplate="{SPLIT:>9999999999}"), "must stand in the folder"),
        (_split(filepathTemplate="{SPLIT.__class__}"), "must stand in the folder"),
        (_split(filepathTemplate=3), "filepathTemplate must be a string"),
        (_split(name="../train"), "plain name"),
        (_split(name=7), "name must be a string"),
        (_split(shardLengths=[10**30]), "cannot read"),
        (_split(shardLengths=["1", "x"]), "cannot read"),
        (_split(shardLengths=[1] * 3), "cannot read"),
        (lambda info: info.update(splits=["train"]), "splits must hold objects"),
        (lambda info: info.update(splits={}), "splits must be a list"),
        (lambda info: info.update(name="../../letters"), "name must be a plain name"),
        (lambda info: info.update(fileFormat="../array_record"), "fileFormat must be a plain"),
        (lambda info: info.update(fileFormat="tfrecord"), "cannot read"),
        (lambda info: info.update(version="../1.0.0"), "version must be a plain name"),
        (lambda info: info.update(version="one"), "cannot read"),
        (lambda info: info.update(configName=["a"]), "configName must be a string"),
        (lambda info: info.clear(), "cannot read"),
    ],
)
def test_damaged_description(letters: Path, edit: Callable[[dict], Any], message: str) -> None:
    change(letters / "dataset_info.json", edit)
    with pytest.raises(DataError, match=message) as caught:
        open_source(options_of(letters))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff", b"[" * 100_000, b"NaN", b'{"pythonClassName": 3}', b"{}"],
)
@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_files_that_are_no_descriptions(letters: Path, name: str, content: bytes) -> None:
    (letters / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(options_of(letters))
    assert len(str(caught.value).splitlines()) == 1


def test_labels_come_from_the_folder(letters: Path) -> None:
    label = {"type": f"{OWN}.class_label_feature.ClassLabel", "content": {"names_file": "/etc/os"}}
    (letters / "features.json").write_text(json.dumps(FORMS["in the old form"](label)))
    with pytest.raises(DataError, match="labels must not come from another file"):
        open_source(options_of(letters))


def test_flipped_bytes_of_records(letters: Path) -> None:
    """Found by the checksums of ArrayRecord, or else at least no crash: one message or a text."""
    (path,) = letters.glob("letters-train*")
    whole = path.read_bytes()
    expected = open_source(options_of(letters))
    expected = [expected[i] for i in range(len(expected))]
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            source = open_source(options_of(letters))
            assert [source[i] for i in range(len(source))] == expected
        except DataError as error:
            assert len(str(error).splitlines()) == 1


def test_a_name_that_is_not_there() -> None:
    started = time.perf_counter()
    with pytest.raises(DataError) as caught:
        open_source(options_of("tfds:wiki40c/en"))
    assert time.perf_counter() - started < 5
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "tensorflow-datasets cannot read data.source='wiki40c/en'" in message
    close = message.split("Close to it: ")[1].rstrip(".").split(", ")
    assert close[0] == "wiki40b" and len(close) == 3


def test_a_download_that_is_not_possible(tmp_path: Path, monkeypatch) -> None:
    """Without internet, or without a package that the data set is prepared with."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    started = time.perf_counter()

    def refuse(address, timeout):
        raise OSError("no route")

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(DataError, match=r"must download 'lambada' from zenodo\.org, which does"):
        open_source(options_of("tfds:lambada", tfds_data_dir=str(tmp_path)))
    if importlib.util.find_spec("apache_beam") is None:
        with pytest.raises(DataError, match="needs the package apache_beam to prepare 'wiki40b/en"):
            open_source(options_of("tfds:wiki40b/en", tfds_data_dir=str(tmp_path)))
    assert time.perf_counter() - started < 10


def test_fingerprint_depends_on_the_records(letters: Path, tmp_path: Path) -> None:
    """A cache of tokens must not be taken for that of other records of the same name."""
    before = open_source(options_of(letters)).fingerprint
    assert open_source(options_of(f"tfds:{letters}")).fingerprint == before
    (path,) = letters.glob("letters-train*")
    path.write_bytes(path.read_bytes())
    assert open_source(options_of(letters)).fingerprint != before
