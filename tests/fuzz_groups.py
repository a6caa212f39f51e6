"""What is fuzzed, a group for each kind of file that is read from outside, and the settings."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny_runs
import zstandard
from corpora import data_config
from fuzz import Draw, Group, Wrong, dump, write

from refine_jax.checkpoint import CheckpointManager, load_model, read_hf, write_hf
from refine_jax.checkpoint.tree import flatten
from refine_jax.config import SECTIONS, Config, DataConfig, PromptsConfig
from refine_jax.data.chat import encode_chat, load_chat_template
from refine_jax.data.pipeline import load_corpus
from refine_jax.data.prompts import load_prompts
from refine_jax.data.sources import open_source
from refine_jax.data.tasks import load_examples
from refine_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from refine_jax.data.tokenizer_files import CHAT
from refine_jax.data.tokens import open_tokens
from refine_jax.evaluation.metrics import score
from refine_jax.generate import read_prompts
from refine_jax.generation import Sampling
from refine_jax.generation.generator import Generator
from refine_jax.generation.states import load_prefix, save_prefix
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model
from refine_jax.phases.changes import check_same_run
from refine_jax.phases.evaluate import check_same_evaluation
from refine_jax.report.metrics import summarize
from refine_jax.report.metrics import table as closing_table
from refine_jax.report.monitor import Monitor

BYTES = ByteTokenizer()
TEXTS = [f"document {i}, the quick brown fox jumps over the lazy dog" for i in range(6)]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".csv", ".jsonl.gz", ".json.gz")
SUFFIXES += (".jsonl.zst", ".json.zst", ".md")
MODELS = {
    "delta_net": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 4, "num_v_heads": 2},
    "lact_swiglu": {
        "num_attn_heads": 2,
        "num_lact_heads": 2,
        "lact_chunk_size": 4,
        "window_size": 4,
        "w0_w2_low_rank": 2,
    },
}
COMMON = {"vocab_size": 259, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8}


def _nothing(folder: Path) -> None:
    del folder


def _pack(content: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    if suffix.endswith(".zst"):
        return zstandard.ZstdCompressor().compress(content)
    return content


def _parquet(rows: list[Any], folder: Path) -> bytes:
    """The rows as a parquet file; those that arrow cannot hold as JSON lines under that name."""
    path = folder / "made.parquet"
    try:
        pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), path)
        return path.read_bytes()
    except Exception:
        return b"\n".join(map(dump, rows))
    finally:
        path.unlink(missing_ok=True)


def _records(draw: Draw, rows: list[Any], folder: Path) -> Path:
    """Rows in a file of any kind, with something wrong in a row, in the bytes, or in both."""
    suffix = draw.one_of(*SUFFIXES)
    wrong = draw.one_of("row", "bytes", "both", "packed")
    if wrong in ("row", "both"):
        rows = draw.json(rows)
    if suffix == ".parquet":
        content = _parquet(rows if isinstance(rows, list) else [rows], folder)
    elif draw.one_of("lines", "array") == "lines" and isinstance(rows, list):
        content = draw.one_of(b"\n", b"\r\n", b"\n\n", b"").join(map(dump, rows))
    else:
        content = dump(rows)
    if wrong in ("bytes", "both"):
        content = draw.bytes(content)
    content = _pack(content, suffix)
    if wrong == "packed":
        content = draw.bytes(content)
    return write(folder / f"file{suffix}", content)


def _options(path: Path, **options: Any) -> DataConfig:
    return data_config(
        source=str(path),
        tokenizer="bytes",
        **{"sequence_length": 8, "min_tokens": 1, "holdout": 0.0} | options,
    )


def documents(draw: Draw, base: None, folder: Path) -> None:
    """Documents of `data.source`, read and tokenised."""
    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    path = _records(draw, rows, folder)
    options = _options(draw.one_of(path, folder, f"{folder}/*"))
    source = open_source(options)
    for index in range(len(source)):
        source[index].encode("utf-8")  # the text is valid
    load_corpus(options, BYTES).dataset("train", 2)


def prompts(draw: Draw, base: None, folder: Path) -> None:
    """Prompts with answers, for post-training."""
    rows = [{"prompt": text, "answer": [str(i), "x"]} for i, text in enumerate(TEXTS)]
    path = _records(draw, rows, folder)
    options = _options(path, sequence_length=64, min_tokens=None)
    load_prompts(options, PromptsConfig(), BYTES).dataset("train", 2)


def evaluation_sets(draw: Draw, base: None, folder: Path) -> None:
    """Examples of evaluations; all that is read is scored and is JSON."""
    task = draw.one_of("hotpotqa", "trec", "niah_single_1", "ruler_squadqa")
    row = {"task": task, "prompt": "Who jumps?", "answers": ["the fox", "fox"]}
    row |= {"max_gen_tokens": 8, "max_seq_length": 512, "metadata": '{"depths": [50]}'}
    if task == "hotpotqa" and draw.number(0, 1):
        row = {"dataset": task, "context": "A fox.", "input": "Who?", "answers": ["fox"]}
    rows = [{**row, "index": i} for i in range(4)]
    path = _records(draw, rows, folder)
    examples = load_examples(
        task,
        data=str(path),
        length=512 if task.startswith("ruler") else None,
        samples=draw.one_of(None, 2),
        tokenizer=BYTES,
    )
    for example in examples:
        json.dumps(dataclasses.asdict(example), allow_nan=False).encode("utf-8")
        assert example.max_new_tokens > 0
        score("ruler_recall", "a response", example.answers)


def question_files(draw: Draw, base: None, folder: Path) -> None:
    """SQuAD's and HotpotQA's files, from which question answering is built."""
    answer = {"text": "a fox", "answer_start": 2}
    paragraph = {
        "context": "It is a fox that jumps.",
        "qas": [{"question": "What jumps?", "answers": [answer], "is_impossible": False}],
    }
    squad = {"data": [{"title": "t", "paragraphs": [paragraph]}] * 2}
    hotpot = [
        {
            "question": "What jumps?",
            "answer": "a fox",
            "supporting_facts": [["Fox", 0]],
            "context": [["Fox", ["A fox jumps."]], ["Dog", ["It sleeps."]]],
        }
    ]
    task, content = draw.one_of(("ruler_squadqa", squad), ("ruler_hotpotqa", hotpot))
    content = draw.json(content)
    packed = dump(content) if draw.number(0, 2) else draw.bytes(dump(content))
    path = write(folder / "file.json", packed)
    examples = load_examples(task, data=str(path), length=4096, samples=1, tokenizer=BYTES)
    json.dumps(dataclasses.asdict(examples[0])).encode("utf-8")


def essays(draw: Draw, base: None, folder: Path) -> None:
    """Text that needles are hidden in."""
    content = draw.one_of(dump({"text": TEXTS[0]}), TEXTS[0].encode())
    path = write(folder / draw.one_of("file.txt", "file.json", "file"), draw.bytes(content))
    load_examples(
        "niah_single_2",
        essays=str(draw.one_of(path, folder)),
        length=512,
        samples=1,
        tokenizer=BYTES,
    )


def prompt_files(draw: Draw, base: None, folder: Path) -> None:
    """Files that `generate` continues."""
    path = write(folder / "file.txt", draw.bytes(TEXTS[0].encode()))
    options = argparse.Namespace(prompt=[], prompt_file=[str(path)])
    for text in read_prompts(options):
        BYTES.encode(text)


# ---- Tokenizers and models ----


def make_tokenizers(folder: Path) -> dict[str, bytes]:
    """A tokenizer.json, its configuration, a chat template, and a SentencePiece model."""
    import sentencepiece
    import tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "the", "fox", "dog"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "pieces"),
        model_type="bpe",
        vocab_size=40,
        minloglevel=2,
    )
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": dump(config),
        "special_tokens_map.json": dump(config),
        "chat_template.jinja": b"""{% for m in messages %}{{ bos_token }}{{ m.role | upper }}
            {{- m['content'] | trim | tojson(indent=1) }}{{ eos_token }}{% break %}{% endfor %}
            {%- if add_generation_prompt is defined %}{{ strftime_now('%Y') }}{% endif %}""",
        "tokenizer.model": (folder / "pieces.model").read_bytes(),
    }


def tokenizer_folders(draw: Draw, base: dict[str, bytes], folder: Path) -> None:
    """Folders with tokenizer files; what loads encodes and decodes."""
    own = ("tokenizer.json", "tokenizer_config.json")
    kinds = draw.one_of(own, (*own, CHAT), ("tokenizer.model",), base)
    files = {name: base[name] for name in kinds}
    name = draw.one_of(*files)
    if name.endswith(".json") and draw.number(0, 2):
        files[name] = dump(draw.json(json.loads(files[name])))
    else:
        files[name] = draw.bytes(files[name])
    for name, content in files.items():
        write(folder / name, content)
    tokenizer = load_tokenizer(folder if name == CHAT else draw.one_of(folder, folder / name))
    bos = tokenizer.bos_id is not None
    ids = tokenizer.encode("the fox </s> \ud83d", bos=bos)
    assert ids.dtype == np.int32 and (ids >= 0).all() and (ids < tokenizer.vocab_size).all()
    tokenizer.decode(ids)
    if CHAT in tokenizer.files:
        chat = [{"role": "user", "content": "the fox </s>"}, {"role": "assistant", "content": "a"}]
        ids = encode_chat(tokenizer, load_chat_template(tokenizer), chat)
        assert ids.dtype == np.int32 and (ids >= 0).all() and (ids < tokenizer.vocab_size).all()


def make_model_folders(folder: Path) -> dict[str, Path]:
    """A Hugging Face folder of each family."""
    made = {}
    for kind, fields in MODELS.items():
        config = model_config(COMMON | {"model_type": kind} | fields)
        params = jax.jit(Model(config).init)(jax.random.key(0))
        made[kind] = folder / kind
        write_hf(made[kind], params, json.dumps(config.to_hf()))
    return made


def model_configs(draw: Draw, base: None, folder: Path) -> None:
    """config.json of a model, fields alone."""
    kind = draw.one_of(*MODELS)
    fields = model_config(COMMON | {"model_type": kind} | MODELS[kind]).to_hf()
    extra = ("rope_scaling", "rope_parameters", "attn", "quantization_config", "dtype")
    fields |= {draw.one_of(*extra): draw.value() for _ in range(draw.number(0, 1))}
    fields = draw.json(fields)
    config = model_config(fields if isinstance(fields, dict) else {"model_type": fields})
    json.dumps(config.to_hf(), allow_nan=False)


def model_folders(draw: Draw, base: dict[str, Path], folder: Path) -> None:
    """Hugging Face folders with a damaged file, or a file too many."""
    source = base[draw.one_of(*base)]
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)
    config, weights = folder / "config.json", folder / "model.safetensors"
    way = draw.one_of("config", "config bytes", "weights", "index", "companions")
    if way == "config":
        config.write_bytes(dump(draw.json(json.loads(config.read_bytes()))))
    elif way == "config bytes":
        config.write_bytes(draw.bytes(config.read_bytes()))
    elif way == "weights":
        weights.write_bytes(draw.bytes(weights.read_bytes()))
    elif way == "index":
        shard = draw.one_of("model-1.safetensors", "sub/model-1.safetensors", "../x.safetensors")
        index = {"metadata": {}, "weight_map": {"a": shard, "b": shard}}
        (folder / "sub").mkdir()
        if not shard.startswith(".."):
            weights.rename(folder / shard)
        content = dump(draw.json(index))
        write(folder / "model.safetensors.index.json", content)
    else:
        name = draw.one_of("generation_config.json", "tokenizer.json", "tokenizer.model")
        write(folder / name, draw.bytes(dump({"eos_token_id": [1, 2]})))
    found = read_hf(folder)
    if way == "weights":
        _same(found.params, read_hf(source).params, weights, allow="values")


def _same(found: Any, wanted: Any, where: Path, allow: str = "") -> None:
    """Raise `Wrong` unless the arrays are those written."""
    found, wanted = flatten(found), flatten(wanted)
    for name, array in wanted.items():
        if name not in found or found[name].shape != array.shape:
            raise Wrong(f"{where}: {name} is missing or of another shape")
        if not allow and np.asarray(found[name]).tobytes() != np.asarray(array).tobytes():
            raise Wrong(f"{where}: {name} has other values than were saved")


# ---- What we wrote ourselves ----


def _damage(draw: Draw, path: Path) -> None:
    """Change a file: what a JSON file says, or the bytes of any."""
    content = path.read_bytes()
    if path.suffix == ".json" and draw.number(0, 2):
        path.write_bytes(dump(draw.json(json.loads(content))))
    else:
        path.write_bytes(draw.bytes(content))


def make_run(folder: Path) -> tuple[Path, dict]:
    """The work folder of a run with two steps, and its parameters."""
    fields = model_config(COMMON | {"model_type": "delta_net", "num_heads": 2}).to_hf()
    params = jax.jit(Model(model_config(fields)).init)(jax.random.key(0))
    config = Config.from_dict(tiny_runs.tiny_run("midtrain"))
    with CheckpointManager(
        folder / "checkpoints",
        config_json=json.dumps(fields),
        run_config=config.to_dict(),
        keep=2,
    ) as manager:
        for step in (1, 2):
            manager.save(step, {"params": params}, {"next_row": step}, force=True)
    write(folder / "metrics.jsonl", b"".join(_metrics(step) for step in range(3)))
    return folder, params


def _metrics(step: int) -> bytes:
    record = {"step": step, "loss/ntp": 2.5, "time/step": 0.1, "time/total": step + 0.5}
    return dump(record | ({"eval/loss": 2.0} if step != 1 else {})) + b"\n"


def run_folders(draw: Draw, base: tuple[Path, dict], folder: Path) -> None:
    """Checkpoints of runs: damaged is refused, and what is read is what was saved."""
    source, params = base
    work = folder / "run"
    shutil.copytree(source, work, symlinks=True)
    files = sorted(path for path in (work / "checkpoints").rglob("*") if path.is_file())
    path = draw.one_of(*files)
    _damage(draw, path)
    check_same_run(Config.from_dict(tiny_runs.tiny_run("midtrain")), work)
    _same(load_model(work, step=draw.one_of("latest", 1)).params, params, path)


def metrics_files(draw: Draw, base: None, folder: Path) -> None:
    """metrics.jsonl of a run: lines that are records are kept."""
    lines = [_metrics(step) for step in range(4)]
    at = draw.number(0, 3)
    if draw.number(0, 1):
        lines[at] = dump(draw.json(json.loads(lines[at]))) + b"\n"
    else:
        lines[at] = draw.bytes(lines[at]).replace(b"\n", b"") + b"\n"
    path = write(folder / "metrics.jsonl", b"".join(lines))
    with Monitor(folder, steps=9, start=4, log_every=0) as monitor:
        found = monitor.history
    kept = [json.loads(line) for i, line in enumerate(lines) if i != at]
    steps = [record["step"] for record in found]
    if any(record not in found for record in kept if steps.count(record["step"]) != 1):
        raise Wrong(f"{path}: of steps {[r['step'] for r in kept]}, {steps} were read")
    closing_table(summarize(found))


def evaluation_records(draw: Draw, base: None, folder: Path) -> None:
    """evaluation.json beside predictions."""
    write(folder / "predictions.jsonl", b"")
    record = {"phase": "evaluate", "parameters": "ab", "evaluate": {"tasks": "vt"}}
    content = draw.bytes(dump(record)) if draw.number(0, 1) else dump(draw.json(record))
    write(folder / "evaluation.json", content)
    check_same_evaluation(record, folder)


def make_cache(folder: Path) -> Path:
    """A folder with the cached tokens of a corpus."""
    corpus = write(folder / "corpus.jsonl", b"\n".join(dump({"text": t}) for t in TEXTS))
    open_tokens(_options(corpus, cache_dir=str(folder / "cache")), BYTES)
    return folder


def token_caches(draw: Draw, base: Path, folder: Path) -> None:
    """Cached tokens: damaged is refused, and what is read is what was tokenised."""
    options = _options(base / "corpus.jsonl", cache_dir=str(folder / "cache"))
    shutil.copytree(base / "cache", folder / "cache")
    path = draw.one_of(*sorted(p for p in (folder / "cache").rglob("*") if p.is_file()))
    _damage(draw, path)
    tokens = open_tokens(options, BYTES)
    for number, text in enumerate(TEXTS):
        found = tokens.read(number, 0, int(tokens.lengths[number]))
        if not np.array_equal(found, BYTES.encode(text)):
            raise Wrong(f"{path}: document {number} has other tokens than were cached")


def positions(draw: Draw, base: Path, folder: Path) -> None:
    """Saved positions in the data."""
    dataset = load_corpus(_options(base / "corpus.jsonl"), BYTES).dataset("train", 2)
    iterator = iter(dataset)
    iterator.set_state(draw.json(iterator.get_state()))
    next(iterator)
    iterator.close()


def tfds_folders(draw: Draw, base: None, folder: Path) -> None:
    """Folders that say they are tensorflow-datasets'."""
    info = {"name": "x", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    feature = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text"}
    features = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {"text": feature}},
    }
    for name, fields in (("dataset_info.json", info), ("features.json", features)):
        content = dump(draw.json(fields)) if draw.number(0, 3) else draw.bytes(dump(fields))
        write(folder / name, content)
    open_source(_options(folder))


def make_state(folder: Path) -> tuple[Any, ...]:
    """A saved state, and what made it."""
    model = Model(model_config(COMMON | {"model_type": "delta_net", "num_heads": 2}))
    params = jax.jit(model.init)(jax.random.key(0))
    prefix = Generator(model, BYTES).read(params, [[1, 2, 3], [4, 5]])
    folder.mkdir()
    save_prefix(folder / "state", prefix, model, params, BYTES)
    return folder / "state", prefix, model, params


def states(draw: Draw, base: tuple[Any, ...], folder: Path) -> None:
    """Saved states: damaged is refused, and what is read is what was saved."""
    source, prefix, model, params = base
    shutil.copytree(source, folder / "state")
    path = draw.one_of(*sorted(p for p in (folder / "state").rglob("*") if p.is_file()))
    _damage(draw, path)
    _same(load_prefix(folder / "state", model, params, BYTES), prefix, path)


# ---- Settings ----


def configurations(draw: Draw, base: None, folder: Path) -> None:
    """Settings of every section with any values."""
    values = tiny_runs.tiny_run(draw.one_of("midtrain", "posttrain", "evaluate")).to_dict()
    for _ in range(draw.number(1, 3)):
        section = draw.one_of(*SECTIONS)
        name = draw.one_of(*[field.name for field in dataclasses.fields(SECTIONS[section])])
        values[section] = {**values[section], name: draw.value()}
    Config.from_dict(values)
    fields = [field for field in dataclasses.fields(DataConfig)]
    data_config(**{draw.one_of(*[field.name for field in fields]): draw.value()})


def samplings(draw: Draw, base: None, folder: Path) -> None:
    """How to generate."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    Sampling(**{draw.one_of(*names): draw.value()})


SETTINGS = ("config.", "data.", "prompts.", "evaluate.", "--", "tokenizer", *SECTIONS)
GROUPS = {
    "documents": Group(_nothing, documents),
    "prompts": Group(_nothing, prompts),
    "evaluation sets": Group(_nothing, evaluation_sets, ("length=512",)),
    "question files": Group(_nothing, question_files, ("samples", "length=4096")),
    "essays": Group(_nothing, essays, ("essays", "length 512")),
    "prompt files": Group(_nothing, prompt_files),
    "tokenizers": Group(make_tokenizers, tokenizer_folders),
    "model configs": Group(_nothing, model_configs, (*MODELS, "model_type")),
    "model folders": Group(make_model_folders, model_folders, (*MODELS, "model_type")),
    "run folders": Group(make_run, run_folders, ("config.", *MODELS, "model_type")),
    "metrics files": Group(_nothing, metrics_files),
    "evaluation records": Group(_nothing, evaluation_records),
    "token caches": Group(make_cache, token_caches),
    "positions in data": Group(make_cache, positions, ("position",)),
    "tfds folders": Group(_nothing, tfds_folders),
    "saved states": Group(make_state, states),
    "settings": Group(_nothing, configurations, SETTINGS),
    "sampling": Group(_nothing, samplings, tuple(f.name for f in dataclasses.fields(Sampling))),
}
