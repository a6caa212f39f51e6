"""Examples from files: RULER's question answering, LongBench, written sets, the tfds builder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from refine_jax.base.errors import DataError
from refine_jax.data import load_tokenizer
from refine_jax.data.builders.needle_sets.needle_sets_dataset_builder import Builder
from refine_jax.data.tasks import TASKS, load_examples, ruler_qa
from refine_jax.data.tasks.files import digest, write_examples
from refine_jax.data.tasks.longbench import LONGBENCH, PROMPTS

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("REFINE_DATA") or ROOT.parent / "shared" / "data")
BYTES = load_tokenizer("bytes")


def real_files(folder: str) -> list[Path]:
    found = sorted((DATA / folder).glob("*.parquet"))
    if not found:
        pytest.skip(f"benchmark data not found: {DATA / folder} (set REFINE_DATA)")
    return found


# ---- RULER's question answering ----


@pytest.fixture
def squad(tmp_path: Path) -> str:
    """Three articles of eight passages, two questions each, and one without an answer."""
    articles = []
    for a in range(3):
        paragraphs = []
        for p in range(8):
            answer = {"text": f"answer {a}.{p}", "answer_start": 0}
            qas = [
                {"question": f"What is {a}.{p}?", "answers": [answer, answer]},
                {"question": f"And what is {a}.{p}?", "answers": [answer], "is_impossible": False},
                {"question": f"What is not {a}.{p}?", "answers": [], "is_impossible": True},
            ]
            context = f"Article {a}, passage {p}: answer {a}.{p} " + "and so on " * (3 + p)
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": f"Article {a}", "paragraphs": paragraphs})
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return str(path)


@pytest.fixture
def hotpotqa(tmp_path: Path) -> str:
    """Twelve questions with four passages each, of which two hold the answer; one is shared."""
    entries = []
    for q in range(12):
        titles = [f"Title {q}.{i}" for i in range(3)]
        context = [[title, [f"About {title}.", " More of it."]] for title in titles]
        context.append(["Shared", ["Said", " everywhere."]])
        entries.append(
            {
                "question": f"Who is in both {q}?",
                "answer": f"answer {q}",
                "supporting_facts": [[titles[0], 0], [titles[2], 1]],
                "context": context,
            }
        )
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(entries))
    return str(path)


def passages_of(prompt: str) -> list[str]:
    context = prompt.partition("given passages.\nDocument 1:\n")[2].partition("\n\nAnswer the")[0]
    return re.split(r"\n\nDocument \d+:\n", context)


def build(name: str, path: str, length: int, **changes):
    options = {"samples": 5, "tokenizer": BYTES, "seed": 0, "data": path, **changes}
    return load_examples(name, length=length, **options)


def test_squad_passages_come_from_the_article_first(squad) -> None:
    for length, articles in ((900, 1), (1800, 3)):
        for example in build("ruler_squadqa", squad, length):
            passages = passages_of(example.prompt)
            topic, number = re.search(r"is (\d)\.(\d)\?", example.prompt).groups()
            assert len(set(passages)) == len(passages) == example.metadata["passages"]
            own = [i for i, text in enumerate(passages) if f"answer {topic}.{number} " in text]
            assert example.metadata["depths"] == [100 * own[0] // len(passages)]
            assert len(own) == 1
            assert {p[8] for p in passages} == {topic} or articles == 3
            assert sum(p[8] == topic for p in passages) == 8 or articles == 1
            assert set(example.answers) == {f"answer {topic}.{number}"}
            assert len(example.answers) == (1 if "And what" in example.prompt else 2)
            tokens = len(BYTES.encode(example.prompt))
            assert tokens == example.metadata["prompt_tokens"]
            assert length * 0.85 < tokens + example.max_new_tokens <= length


def test_hotpotqa_keeps_a_questions_own_passages(hotpotqa) -> None:
    for example in build("ruler_hotpotqa", hotpotqa, 1200):
        passages = passages_of(example.prompt)
        number = re.search(r"both (\d+)\?", example.prompt)[1]
        for i in range(3):
            assert passages.count(f"Title {number}.{i}\nAbout Title {number}.{i}. More of it.") == 1
        assert passages.count("Shared\nSaid everywhere.") == 1
        gold = [
            100 * place // len(passages)
            for place, text in enumerate(passages)
            if text.startswith((f"Title {number}.0", f"Title {number}.2"))
        ]
        assert example.metadata["depths"] == gold
        assert example.answers == (f"answer {number}",)


def test_questions_are_the_same_at_every_length_and_each_seed_has_its_own(squad) -> None:
    def asked(examples):
        return [example.metadata["question"] for example in examples]

    short, long = build("ruler_squadqa", squad, 900), build("ruler_squadqa", squad, 2400)
    assert asked(short) == asked(long) == asked(build("ruler_squadqa", squad, 900))
    assert asked(short) != asked(build("ruler_squadqa", squad, 900, seed=1))
    assert build("ruler_squadqa", squad, 900, samples=2) == short[:2]


def test_a_file_that_is_used_up_ends_the_haystack(squad) -> None:
    (example,) = build("ruler_squadqa", squad, 20_000, samples=1)
    assert example.metadata["passages"] == 24


def test_wrong_question_files_are_named(tmp_path, squad, hotpotqa) -> None:
    (tmp_path / "none.json").write_text('{"data": []}')
    (tmp_path / "broken.json").write_text("{")
    for message, name, path, length in (
        ("is not a file of SQuAD", "ruler_squadqa", hotpotqa, 900),
        ("is not a file of HotpotQA", "ruler_hotpotqa", squad, 900),
        ("holds no question", "ruler_squadqa", str(tmp_path / "none.json"), 900),
        ("broken.json is not JSON", "ruler_squadqa", str(tmp_path / "broken.json"), 900),
        ("only 0 of the 48 questions", "ruler_squadqa", squad, 300),
    ):
        with pytest.raises(DataError, match=message):
            build(name, path, length)


def test_prompts_are_those_of_the_published_sets() -> None:
    for path in real_files("ruler"):
        for row in pyarrow.parquet.read_table(path).slice(0, 20).to_pylist():
            passages = passages_of(row["prompt"])
            text = row["prompt"].rpartition("Question: ")[2].removesuffix("\nAnswer:")
            question = ruler_qa.PassageQuestion(text, (), (), frozenset())
            assert ruler_qa._prompt(question, range(len(passages)), passages) == row["prompt"]


# ---- Files of examples ----


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_written_sets_are_read_back(tmp_path, suffix) -> None:
    options = {"samples": 3, "tokenizer": BYTES}
    made = {n: load_examples("niah_multikey_2", length=n, **options) for n in (1200, 1500)}
    for length, examples in made.items():
        write_examples(examples, tmp_path / f"set_{length}.{suffix}")
    for length, examples in made.items():
        found = load_examples("niah_multikey_2", length=length, data=str(tmp_path), **options)
        assert found == examples
    with pytest.raises(DataError, match=r"several files.*set_1200.*set_1500"):
        load_examples("niah_multikey_2", data=str(tmp_path), **options)
    with pytest.raises(DataError, match=r"no examples of vt in .*holds: niah_multikey_2 of leng"):
        load_examples("vt", data=str(tmp_path), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"set_1200.{suffix}",
        f"set_1500.{suffix}",
    ]
    with pytest.raises(DataError, match=r"written to .parquet or .jsonl"):
        write_examples([], tmp_path / "set.txt")


@pytest.mark.parametrize("name", LONGBENCH)
def test_longbenchs_own_rows_get_its_prompts(tmp_path, name) -> None:
    row = {
        "input": "THE {INPUT}",
        "context": "THE {CONTEXT}",
        "answers": ["one", "two"],
        "dataset": name,
        "all_classes": None,
        "length": 12,
    }
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps({**row, "dataset": "passage_count"}))
    (example,) = load_examples(name, data=str(path), tokenizer=BYTES)
    assert example.prompt.count("THE {CONTEXT}") == 1
    assert example.prompt.count("THE {INPUT}") == ("{input}" in PROMPTS[name])
    assert example.answers == ("one", "two")
    assert example.max_new_tokens == TASKS[name].max_new_tokens
    assert example.metadata["prompt_tokens"] == 1 + len(example.prompt)


def test_rows_are_chosen_by_the_seed_and_long_ones_left_out(tmp_path, caplog) -> None:
    rows = [{"prompt": "x" * (10 * i), "answers": [str(i)], "task": "lcc"} for i in range(30)]
    path = str(tmp_path / "lcc.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def load(**options):
        return load_examples("lcc", data=path, tokenizer=BYTES, **options)

    assert [example.index for example in load()] == list(range(30))
    # bos, 10 i bytes and the budget of 64
    assert [example.index for example in load(length=165)] == list(range(11))
    assert "left out 19 of 30 rows" in caplog.text
    few = load(samples=5, seed=1)
    assert [example.index for example in few] == sorted({example.index for example in few})
    assert len(few) == 5 and few == load(samples=5, seed=1) != load(samples=5, seed=2)
    assert load(samples=99) == load()
    write_examples(few, tmp_path / "few" / "lcc.parquet")
    again = load_examples("lcc", data=str(tmp_path / "few"), tokenizer=BYTES)
    assert [(e.prompt, e.answers) for e in again] == [(e.prompt, e.answers) for e in few]
    with pytest.raises(DataError, match=r"none of the 30 rows of .* fits into length=60"):
        load(length=60)


def test_incomplete_rows_are_named(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    for content, message in (
        ('{"prompt": "a"}', r"rows.jsonl, line 1 needs a prompt and answers. Got: prompt"),
        ('{"prompt": 3, "answers": []}', "needs a prompt and answers"),
        ("nothing", "rows.jsonl, line 1 is not JSON"),
        ('{"prompt": "a", "answers": []}\n["a", "b"]', "line 2 must be a JSON object. Got: list"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load_examples("lcc", data=str(path), tokenizer=BYTES)
    with pytest.raises(DataError, match="no such file or folder: data='nowhere'"):
        load_examples("lcc", data="nowhere", tokenizer=BYTES)


def test_published_longbench_files_are_read() -> None:
    tokenizer = load_tokenizer("mistral-v1")
    for path in real_files("longbench"):
        rows = pyarrow.parquet.read_table(path).to_pylist()
        name = rows[0]["task"]
        examples = load_examples(name, data=str(path), samples=2, tokenizer=tokenizer)
        for example in examples:
            row = rows[example.index]
            assert (example.prompt, list(example.answers)) == (row["prompt"], row["answers"])
            assert example.metadata["prompt_tokens"] == row["prompt_length"]
            assert example.max_new_tokens == row["max_gen_tokens"]
        assert {row["max_gen_tokens"] for row in rows} == {TASKS[name].max_new_tokens}
        # What stands around the context in the published prompts.
        before, after = PROMPTS[name].split("{context}")
        middle, _, after = after.partition("{input}")
        for row in rows:
            assert row["prompt"].startswith(before)
            assert middle in row["prompt"] and row["prompt"].endswith(after)


def test_published_ruler_files_are_read() -> None:
    tokenizer = load_tokenizer("mistral-v1")
    real_files("ruler")
    for name, length in (("ruler_squadqa", 4096), ("ruler_squadqa", 8192)):
        options = {"data": str(DATA / "ruler"), "tokenizer": tokenizer}
        examples = load_examples(name, length=length, samples=5, **options)
        assert len(examples) == 5
        for example in examples:
            assert example.metadata["length"] == length
            assert example.max_new_tokens == 32
            assert example.prompt.endswith("\nAnswer:")


# ---- The tfds builder and the command ----


def test_the_builder_holds_the_same_sets(tmp_path) -> None:
    names, lengths = ("niah_single_1", "fwe"), (900, 1200)
    options = {"tokenizer": "bytes", "samples": 3, "seed": 5}
    builder = Builder(tasks=names, lengths=lengths, data_dir=str(tmp_path), **options)
    builder.download_and_prepare(download_dir=str(tmp_path / "downloads"))
    for name in names:
        for length in lengths:
            made = load_examples(name, length=length, samples=3, seed=5, tokenizer=BYTES)
            source = builder.as_data_source(f"{name}_{length}")
            assert len(source) == len(made)
            for example, record in zip(made, source, strict=True):
                assert record["prompt"].decode() == example.prompt
                assert [text.decode() for text in record["answers"]] == list(example.answers)
                assert (record["task"].decode(), record["index"]) == (name, example.index)
                assert record["max_new_tokens"] == example.max_new_tokens
                assert json.loads(record["metadata"]) == example.metadata
    with pytest.raises(DataError, match=r"built from a seed. Got: \['trec'\]"):
        Builder(tasks=("trec",), data_dir=str(tmp_path))
    for nothing in ({"tasks": ()}, {"lengths": ()}, {"samples": 0}):
        with pytest.raises(DataError, match="a task, a length and a sample at least"):
            Builder(**{"tasks": names, "data_dir": str(tmp_path)} | nothing)


def test_command(tmp_path) -> None:
    command = [sys.executable, "-m", "refine_jax.data.tasks.generate", "--tokenizer=bytes"]
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    flags = ["--tasks=niah_single_1,fwe", "--lengths=900", "--samples=2", f"--out={tmp_path}"]
    good = subprocess.run([*command, *flags, "--format=.jsonl"], **run)
    assert good.returncode == 0, good.stderr
    for line, name in zip(good.stdout.splitlines(), ("niah_single_1", "fwe"), strict=True):
        made = json.loads(line)
        examples = load_examples(name, length=900, samples=2, tokenizer=BYTES, data=made["file"])
        assert (made["examples"], made["sha256"]) == (2, digest(examples))
    # What is wrong with any of the sets is said before the first is written.
    flags = ["--tasks=fwe,niah_single_2", f"--out={tmp_path / 'bad'}"]
    bad = subprocess.run([*command, *flags], **run)
    assert bad.returncode == 1
    assert bad.stderr.splitlines()[-1].startswith("error: this task hides its needles in essays")
    assert not (tmp_path / "bad").exists()
