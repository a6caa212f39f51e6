"""Conversations: which tokens are the assistant's, rows of them, and bad input."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import REASONING, TURNS, tokenizer_folder
from corpora import data_config

from refine_jax.base.errors import DataError
from refine_jax.config import PromptsConfig
from refine_jax.data import encode_chat, load_chat_template, load_tokenizer
from refine_jax.data.conversations import encode_conversation, read_messages
from refine_jax.data.prompts import load_prompts

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2? <|im_end|>"},
    {"role": "assistant", "content": " <think>\nsums\n</think>\n\n4, who is user "},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nBecause <|im_end|>."},
    {"role": "user", "content": "never answered"},
]
PLAIN = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ahab."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Whale."},
]


def made(tmp_path, template=TURNS):
    found = load_tokenizer(tokenizer_folder(tmp_path / "t", template))
    return found, load_chat_template(found)


def answers(found, template, chat) -> list[str]:
    """The texts of the answers of a chat."""
    messages = read_messages(chat, lambda: "here")
    ids, spans = encode_conversation(found, template, messages)
    # What an answer is sampled after is what the model reads before the last one.
    asked = encode_chat(found, template, messages[:-1], add_generation_prompt=True)
    assert ids[: len(asked)].tolist() == asked.tolist() and spans[-1] == (len(asked), len(ids))
    ends = found.special_tokens["<|im_end|>"]
    for start, end in spans:
        assert ids[end - 1] == ends and ends not in ids[start : end - 1]
    return [found.decode(ids[start : end - 1]) for start, end in spans]


def test_the_answers_of_a_chat(tmp_path):
    assert answers(*made(tmp_path, REASONING), CHAT) == [
        "4, who is user",
        "so\n</think>\n\nBecause <|im_end|>.",
    ]


def test_an_answer_begins_where_one_is_asked_for(tmp_path):
    """The template asks for a thought: what the data says before it is not the model's to say."""
    thoughts = [CHAT[1], CHAT[4]]
    assert answers(*made(tmp_path), thoughts) == ["so\n</think>\n\nBecause <|im_end|>."]
    without = TURNS.replace("<think>\\n", "")
    assert answers(*made(tmp_path, without), PLAIN) == ["Ahab.", "Whale."]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TURNS.replace("message.content", "message.content[:4]"), "as it is, to tell"),
        (TURNS.replace("message.content", "message.content * 2"), "show each answer .* once"),
        (TURNS.replace("<|im_end|>", ""), r"end token, <\|im_end\|>\. .*behind answer 1"),
        ("{{ raise_exception('no') }}", "refuses the messages: no"),
    ],
)
def test_templates_that_do_not_tell_the_tokens(template, words, tmp_path):
    found, template = made(tmp_path, template)
    with pytest.raises(DataError, match=words):
        encode_conversation(found, template, PLAIN)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Who?", "must be a list of messages, .* Got: str, 'Who"),
        (["Who?"], "message 1 of here must be an object with role and content. Got: str"),
        ([PLAIN[0], {"role": "user"}], r"content of message 2 .* Got: NoneType, None, in a"),
        ([{"from": "human", "value": "x"}], r"role of message 1 .* \['from', 'value'\]"),
        ([{"role": "user", "content": [{"text": "x"}]}], "content of message 1 .* Got: list"),
    ],
)
def test_what_is_no_conversation(value, words):
    with pytest.raises(DataError, match=words):
        read_messages(value, lambda: "here")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_conversations(suffix, tmp_path):
    found, template = made(tmp_path, TURNS.replace("<think>\\n", ""))
    records = [{"messages": chat} for chat in (PLAIN, PLAIN[:1], [], PLAIN[:2])]
    records[1]["messages"] = None
    file = tmp_path / f"chats.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        file.write_text("".join(json.dumps(each) + "\n" for each in records))

    def rows(most):
        corpus = load_prompts(
            data_config(source=str(file), sequence_length=64, add_bos=False),
            PromptsConfig(max_answer_tokens=most, messages_field="messages"),
            found,
        )
        dataset = corpus.dataset("train", 2)
        iterator = iter(dataset)
        batch = next(iterator)
        iterator.close()
        order = np.argsort(batch["example"])
        return corpus, dataset.statistics, {name: x[order] for name, x in batch.items()}

    corpus, statistics, batch = rows(16)
    assert corpus.answers == [("Whale.",), ("Ahab.",)]
    assert (statistics.records, statistics.without_answer, statistics.untrained) == (4, 2, 0)
    ids, spans = encode_conversation(found, template, PLAIN)
    assert batch["tokens"][0, : len(ids)].tolist() == ids.tolist()
    mask = np.zeros(64, int)
    for (start, end), kind in zip(spans, (2, 1), strict=True):
        mask[start:end] = kind
    assert batch["answer_mask"][0].tolist() == mask.tolist()
    assert batch["segments"][0].tolist() == [1] * len(ids) + [0] * (64 - len(ids))
    short, ((start, end),) = encode_conversation(found, template, PLAIN[:2])
    assert np.flatnonzero(batch["answer_mask"][1]).tolist() == list(range(start, end))
    assert batch["tokens"][1, : len(short)].tolist() == short.tolist()
    # Too little room for all answers: the last one stays, and what is next to it.
    last, first = (end - start for start, end in reversed(spans))
    _, statistics, batch = rows(last + 2)
    assert statistics.untrained == first - 2
    assert "tokens of earlier answers not trained on" in statistics.summary()
    kept = np.flatnonzero(batch["answer_mask"][0])
    assert kept.tolist() == [spans[0][1] - 2, spans[0][1] - 1, *range(*spans[1])]


def test_bad_records_are_named_with_their_place(tmp_path):
    found, _ = made(tmp_path)
    file = tmp_path / "chats.jsonl"

    def load(source=str(file), tokenizer=found, field="messages"):
        options = data_config(source=source, sequence_length=64, add_bos=False)
        return load_prompts(options, PromptsConfig(messages_field=field), tokenizer)

    file.write_text(json.dumps({"messages": PLAIN}) + "\n" + json.dumps({"messages": "x"}) + "\n")
    with pytest.raises(DataError, match=r"'messages' in .*chats.jsonl, line 2 must be a list"):
        load()
    with pytest.raises(DataError, match=r"no field 'chat' in .* set prompts.messages_field"):
        load(field="chat")
    with pytest.raises(DataError, match="bytes has no chat template"):
        load(tokenizer=load_tokenizer("bytes"))
    with pytest.raises(DataError, match="'recall' has prompts and answers, not messages"):
        load(source="recall")
    file.write_text(json.dumps({"messages": PLAIN[:1]}))
    with pytest.raises(DataError, match=r"no prompt with an answer .* 1 no answer"):
        load()
