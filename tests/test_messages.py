"""Messages name the flag or setting of the command, and say what a file or folder is."""

import io
import json

import numpy as np
import pytest
from corpora import data_config

from refine_jax import convert, generate, lm_harness, main
from refine_jax.base.errors import CheckpointError, ConfigError, DataError
from refine_jax.base.files import is_lfs_pointer, numbered
from refine_jax.checkpoint.folders import check_free
from refine_jax.checkpoint.weights import weight_files
from refine_jax.config import EvaluateConfig
from refine_jax.data import load_tokenizer, open_source, prepare
from refine_jax.data.records import Records
from refine_jax.data.tasks import generate as tasks
from refine_jax.evaluation import position
from refine_jax.evaluation.questions import load_questions
from tests.data.test_tokenizer import write_tokenizer_json

BYTES = load_tokenizer("bytes")


def ended(command, arguments, capsys) -> tuple[int, str]:
    """The exit code of a command that fails, and its one line on standard error."""
    try:
        code = command(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: "), err
    return code, err.removeprefix("error: ")


FLAGS = {  # of each command, one that it has
    generate: "checkpoint",
    convert: "overwrite",
    lm_harness: "include_path",
    position: "checkpoint",
    main: "workdir",
    prepare: "source",
    tasks: "essays",
}


@pytest.mark.parametrize("module", FLAGS, ids=lambda module: module.__name__)
def test_a_wrong_flag_is_the_same_line_in_every_command(module, capsys):
    before = ["to_hf", "a", "b"] if module is convert else []
    flag = FLAGS[module]
    for wrong in (flag[:-1], flag[:5], flag + "s"):  # abbreviations are wrong flags, too
        expected = f"There is no flag --{wrong}. Did you mean '--{flag}'? --help lists the flags.\n"
        assert ended(module.main, [*before, f"--{wrong}=x"], capsys) == (1, expected)
        assert ended(module.main, [*before, f"--{wrong}", "x"], capsys) == (1, expected)
    code, message = ended(module.main, [*before, "--xyzzy"], capsys)
    assert (code, message) == (1, "There is no flag --xyzzy. --help lists the flags.\n")
    for arguments in ([f"--{'n' * 10_000}"], [*before, "stray" * 1000]):
        code, message = ended(module.main, arguments, capsys)
        assert code == 1 and len(message) < 600


@pytest.mark.parametrize("module", [generate, convert, lm_harness, position])
def test_help_of_commands_with_groups_is_the_docstring(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    page = capsys.readouterr().out
    assert end.value.code == 0 and set(module.__doc__.strip().splitlines()) <= set(
        page.splitlines()
    )


def test_texts_that_begin_like_flags_are_texts(capsys, monkeypatch):
    """What argparse takes for the value of a flag is not taken for a wrong flag."""
    seen = []
    monkeypatch.setattr(generate, "run", lambda options: seen.append(options.prompt))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    given = ["--checkpoint=x", "--prompt", "-- she said", "--prompt=--flag", "--prompt", "-1"]
    assert generate.main(given) == 0
    assert seen == [["-- she said", "--flag", "-1"]] and not capsys.readouterr().err


ROWS = {"text": '"a text"', "number": "7", "null": "null", "list": "[1]"}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("fields", [None, {"text": "data.text_field"}], ids=["all", "named"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_must_be_objects(kind, fields, name, tmp_path):
    path = tmp_path / name
    content = [{"text": "a"}, json.loads(ROWS[kind])]
    path.write_text(
        json.dumps(content) if name.endswith(".json") else "\n".join(map(json.dumps, content))
    )
    records = Records([path], fields)
    place = f"{path}, {'line' if name.endswith('l') else 'record'} 2"
    with pytest.raises(DataError) as error:
        records[1]
    assert str(error.value).startswith(f"{place} must be a JSON object. Got: ")


def test_objects_without_fields_are_said(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    commands = (
        [tasks, "--tasks=trec", f"--data={path}"],
        [tasks, "--tasks=niah_single_2", f"--essays={path}"],
    )
    for module, *arguments in commands:
        given = [*arguments, "--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
        code, message = ended(module.main, given, capsys)
        assert code == 1 and f"{path}, line 1" in message
        assert message.endswith("Got: an object without fields.\n")


REQUESTS = {
    "pattern": ({"tasks": "*"}, "tasks", "'*'"),
    "patterns": ({"tasks": "niah_single_1,niah_*"}, "tasks", "'niah_*'"),
    "no essays": ({"tasks": "niah_single_2"}, "essays", "stdlib"),
    "essays nowhere": ({"tasks": "niah_single_2", "essays": "nowhere"}, "essays", "'nowhere'"),
    "empty essays": ({"tasks": "niah_single_2", "essays": "FOLDER/blank.txt"}, "essays", "no text"),
    "no data": ({"tasks": "trec"}, "data", "jsonl"),
    "no questions": ({"tasks": "ruler_squadqa"}, "data", "SQuAD"),
    "data nowhere": ({"tasks": "trec", "data": "nowhere"}, "data", "'nowhere'"),
    "text as data": ({"tasks": "trec", "data": "FOLDER/blank.txt"}, "data", "blank.txt"),
    "other tasks": ({"tasks": "trec", "data": "FOLDER/lcc.jsonl"}, "data", "lcc"),
    "samples": ({"tasks": "vt", "samples": "2000000"}, "samples", "2000000"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_errors_of_tasks_name_the_flag_or_the_setting(case, tmp_path, capsys):
    values, name, words = REQUESTS[case]
    (tmp_path / "blank.txt").write_text(" ")
    row = {"task": "lcc", "prompt": "p", "answers": ["a"]}
    (tmp_path / "lcc.jsonl").write_text(json.dumps(row) + "\n")
    values = {key: value.replace("FOLDER", str(tmp_path)) for key, value in values.items()}
    given = {"samples": "1", "tokenizer": "bytes", "out": str(tmp_path / "out")} | values
    flags = [f"--{key}={value}" for key, value in given.items()]
    code, message = ended(tasks.main, flags, capsys)
    assert code == 1 and f"--{name}" in message and words in message
    assert not (tmp_path / "out").exists()
    values = {"lengths": "4096", "samples": int(values.pop("samples", 1))} | values
    with pytest.raises((ConfigError, DataError)) as error:
        load_questions(EvaluateConfig(**values), BYTES, bos=False)
    assert f"config.evaluate.{name}" in str(error.value) and words in str(error.value)


def test_notes_on_essays_and_data_are_said_once(tmp_path, capsys, caplog):
    essays, data = tmp_path / "essays", tmp_path / "data"
    for folder in (essays, data):
        folder.mkdir()
    for number in range(3):
        (essays / f"{number}.txt").write_text('{"a": 1} and words. ' * 5)
    row = {"prompt": "p", "answers": ["a"], "max_seq_length": None}
    lines = "".join(json.dumps(row | {"task": name}) + "\n" for name in ("trec", "lcc"))
    (data / "rows.jsonl").write_text(lines)
    (data / "more.csv").write_text("a")
    common = ["--tokenizer=bytes", "--samples=1", "--lengths=2000,3000", f"--out={tmp_path}"]
    needles = "--tasks=niah_single_2,niah_multikey_1"
    assert tasks.main([*common, needles, f"--essays={essays}"]) == 0
    assert caplog.text.count("is read as one text") == 1
    assert tasks.main([*common, "--tasks=trec,lcc", f"--data={data}"]) == 0
    assert caplog.text.count("that are not read: more.csv") == 1
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_a_tokenizer_without_bos_names_the_setting_and_its_advice_works(tmp_path, capsys):
    tokenizer = write_tokenizer_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("dog")
    given = [f"--source={tmp_path / 'a.txt'}", f"--tokenizer={tokenizer}", f"--out={tmp_path}"]
    assert prepare.main(given) == 1
    assert "no bos token: set --add_bos=False." in capsys.readouterr().err
    assert prepare.main([*given, "--add_bos=False"]) == 0
    assert prepare.main([*given, "--add_bos=False", "--add_eos"]) == 1
    assert "no eos token: set --add_eos=False." in capsys.readouterr().err
    config = EvaluateConfig(tasks="vt", lengths="2000", samples=1)
    with pytest.raises(DataError, match=r"no bos token: set config\.data\.add_bos=False\."):
        load_questions(config, load_tokenizer(tokenizer), bos=True)


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "checkpoints/run.json", "checkpoints/config.json"]
)
def test_the_folder_of_a_run_is_not_overwritten_and_called_that(name, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=f"holds a training run .{name}") as error:
        check_free(tmp_path / "run", overwrite=True)
    assert "Choose another name." in str(error.value) and path.read_text() == "{}"


def test_a_folder_of_save_to_disk_is_called_that_and_its_advice_works(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the optional datasets library")
    texts = ["one", "two"]
    part = datasets.Dataset.from_dict({"text": texts})
    part.save_to_disk(tmp_path / "part")
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "parts")
    for name in ("part", "parts"):
        with pytest.raises(DataError) as error:
            open_source(data_config(source=str(tmp_path / name)))
        message = str(error.value)
        for words in (
            "written by datasets.save_to_disk",
            "load_from_disk",
            "to_parquet",
            "to_json",
        ):
            assert words in message
        assert "a split at a time" in message and len(message) < 600
    with pytest.raises(DataError, match=r"it lacks features\.json"):
        open_source(data_config(source=f"tfds:{tmp_path / 'part'}"))
    datasets.load_from_disk(tmp_path / "part").to_parquet(tmp_path / "out.parquet")
    datasets.load_from_disk(tmp_path / "parts")["test"].to_json(tmp_path / "out.jsonl")
    for name in ("out.parquet", "out.jsonl"):
        source = open_source(data_config(source=str(tmp_path / name)))
        assert [source[i] for i in range(len(source))] == texts


@pytest.mark.parametrize("host", ["git-lfs", "hawser"])
def test_pointers_of_git_lfs_are_called_that_wherever_they_stand(host, tmp_path):
    content = f"version https://{host}.github.com/spec/v1\noid sha256:ab\nsize 12\n".encode()
    for name in ("model.safetensors", "tokenizer.model", "rows.jsonl", "rows.parquet", "a.txt"):
        (tmp_path / name).write_bytes(content)
    advice = "git-lfs, not the file.*: run git lfs pull where it was cloned, or copy"
    assert is_lfs_pointer(content) and is_lfs_pointer(tmp_path / "a.txt")
    assert not is_lfs_pointer(content[1:])
    with pytest.raises(CheckpointError, match=advice):
        weight_files(tmp_path)
    with pytest.raises(DataError, match=advice):
        load_tokenizer(tmp_path)
    for name in ("rows.jsonl", "rows.parquet", "a.txt"):
        source = data_config(source=str(tmp_path / name))
        with pytest.raises(DataError, match=advice):
            open_source(source)[0]


def test_one_is_singular():
    rng = np.random.default_rng(0)
    for size in range(1, 30):
        numbers = np.unique(rng.integers(1, 50, size)).tolist()
        words = numbered("step", numbers)
        assert words.startswith("step " if len(numbers) == 1 else "steps ")
    assert numbered("line", [7]) == "line 7" and numbered("line", [7, 8]) == "lines 7 to 8"
