"""Made-up facts: documents whose numbers follow from what was told, and the task that asks."""

import re

import numpy as np
import pytest

from refine_jax.base.errors import DataError
from refine_jax.config import DataConfig
from refine_jax.data.recall import COLOURS, DOCUMENTS, FACTS, LINES, THINGS, RecallPrompts
from refine_jax.data.sources import open_source
from refine_jax.data.tasks import load_examples
from refine_jax.data.tokenizer import load_tokenizer

TOLD = r"The number of the (\w+ \w+) is (\d{4})\."
ASKED = r"What is the number of the (\w+ \w+)\? Answer: (\d{4})"
BYTES = load_tokenizer("bytes")


def read(text):
    """(facts told, lines that repeat or ask); fails where a number does not follow."""
    known, repeated, before = {}, [], None
    for line in text.split("\n"):
        told, asked = re.fullmatch(TOLD, line), re.fullmatch(ASKED, line)
        assert told or asked or not line
        if line:
            # An empty line stands where telling and asking meet, and nowhere else.
            assert before in (None, bool(told)), text
            name, number = (told or asked).groups()
            if name in known or asked:
                assert known[name] == number
                repeated.append(bool(asked))
            known.setdefault(name, number)
        before = bool(told) if line else None
    return known, repeated


def test_every_number_is_told_before_it_is_repeated_or_asked_for():
    source = open_source(DataConfig(source="recall"))
    assert len(source) == DOCUMENTS
    asked = []
    for index in (*range(40), DOCUMENTS - 1):
        known, repeated = read(source[index])
        assert FACTS[0] <= len(known) <= FACTS[1]
        assert len(known) + len(repeated) == LINES
        asked += repeated
        for name in known:
            colour, thing = name.split()
            assert colour in COLOURS and thing in THINGS
    assert 0.4 < np.mean(asked) < 0.6


def test_documents_depend_on_their_number_alone_and_differ():
    first, second = (open_source(DataConfig(source="recall")) for _ in range(2))
    assert first[7] == second[7] and first.fingerprint == second.fingerprint
    assert len({first[index] for index in range(50)}) == 50


@pytest.mark.parametrize("length", [300, 500])
def test_the_task_fills_its_length_and_asks_for_a_fact_of_the_prompt(length):
    examples = load_examples("recall", length=length, samples=20, tokenizer=BYTES)
    for example in examples:
        tokens = len(BYTES.encode(example.prompt))
        assert tokens == example.metadata["prompt_tokens"]
        # One more fact of the longest kind would not fit.
        assert length - 2 * 50 <= tokens <= length - example.max_new_tokens
        facts = dict(re.findall(TOLD, example.prompt))
        (name,) = re.findall(r"What is the number of the (\w+ \w+)\? Answer:$", example.prompt)
        assert example.answers == (facts[name],)
        depth = 100 * example.prompt.index(f"{name} is {facts[name]}") / len(example.prompt)
        assert abs(example.metadata["depths"][0] - depth) < 10
    trained = RecallPrompts(length, BYTES, seed=0)
    assert not {example.prompt for example in examples} & {trained[n][0] for n in range(20)}


def test_a_length_without_room_is_refused():
    with pytest.raises(DataError, match="room for two facts and a question"):
        load_examples("recall", length=100, samples=1, tokenizer=BYTES)
