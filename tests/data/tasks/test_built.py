"""RULER's built sets: the same everywhere, within their budgets, and answerable as they say."""

import collections
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import DataError
from refine_jax.data import load_tokenizer
from refine_jax.data.tasks import TASKS, load_examples, needs_essays, synthetic
from refine_jax.data.tasks.draw import Draw, word_lists
from refine_jax.data.tasks.files import digest
from refine_jax.data.tasks.haystack import DEPTHS, NOISE, fit, load_essays

ROOT = Path(__file__).parents[3]
BUILT = [name for name, task in TASKS.items() if task.group in ("niah", "ruler")]
NIAH = [name for name in BUILT if name.startswith("niah")]
LENGTHS = {"mistral-v1": 1024, "bytes": 3072}
SAMPLES = 4
SENTENCE_WORDS = 9

# SHA-256 of the first samples of seed 0: published sets must not change.
DIGESTS = {
    "mistral-v1": {
        "niah_single_1": "d56cdde689658053172878dc0a324cc1e98dd3b1f4d2de7d6e0f48f7d398a36f",
        "niah_single_2": "1a75180c0de30087eb8f87864f08f9927172da47ed19fd997f22712dc0c43a34",
        "niah_single_3": "947e37975f59ba5dc51c4e84fbeff28b1d5c1e870a08ff47255f0ab388054be8",
        "niah_multikey_1": "7a7daea5ff61e2c1578687b9ebb13d97f19233e12296e72bb3a0245dbcb03150",
        "niah_multikey_2": "0ed39d2b643c172f2ff00149fb58c9c9c9f469f6c1995a37d8c241c49d0a619f",
        "niah_multikey_3": "537c08111dd8ba0e49c507796516d21dbf7a94ce82417b98b8afbdaa2d7e8ee9",
        "niah_multivalue": "ab82e29ef72fee97bc6ef58aeb89a473863ca6cc67b89104dc6d25670be5bbd6",
        "niah_multiquery": "3e034ecd2fc94e897923578fe019e2f134fb2f104de9a08f2cb3279824ff7fea",
        "vt": "a3e224fcd2da40b833736ba3afa909c4cea2509e7de66d66658e0b4af625c3fb",
        "cwe": "b5d7e9ed14ba9e3c2c4436ef821b7f4e58f869d0bb73de51695bde09514bddce",
        "fwe": "bc864b120cb0921df6bf3c34c76d891366e04b137104b36bd73ad8c2bd49ac8f",
    },
    "bytes": {
        "niah_single_1": "6abb68e5d021b9c3f6b359e9d323f10c5e34933d4e347de8f8ed1e69d663294e",
        "niah_single_2": "d4d1232366babd89872bc34ad82db8daa670bcc40e6edbaff9842158cf7fe234",
        "niah_single_3": "b599a2a254f1f6db513507e0e35da21dfa872f754b564141474fdec57bb3b2a5",
        "niah_multikey_1": "50a20be128488b848beb0770c96e37eb49ddb32d2cb8f2a2f6e5be8c55105d52",
        "niah_multikey_2": "1023243118fa3ca246b9467c8e0677defadbc0129f78cacbfb3a867f5dcd5875",
        "niah_multikey_3": "0617802d0ed69f10c536401820cda614fd1f2b14a32eecee64a90dcc5c93ca4f",
        "niah_multivalue": "a0845a988a04d29d2c58643b95f2a9274168a6318bf068ce7007473e0b7173bb",
        "niah_multiquery": "949e0623d2ebe2a4deffac2d14e2c9bab3b134ef94052dbd3eb12a75eb286bb6",
        "vt": "5b142f7c1d4c8d227c1757ce357e9fad5e36faeb932729573cff42db3294a8d0",
        "cwe": "b98ef0f7ff7b41fbb8700ba5f031599469320062796488c4b1b76802e17b15a9",
        "fwe": "50060a3b5b878c71e881dee5f71b2b77baf961252807c1bfb59a0f586e7f2b50",
    },
}

# The digests of all sets, by another interpreter: python -c DIGEST_ALL essays.txt
DIGEST_ALL = """
import json, sys
from refine_jax.data import load_tokenizer
from refine_jax.data.tasks import load_examples
from refine_jax.data.tasks.files import digest
essays, names, lengths, samples = sys.argv[1], *map(json.loads, sys.argv[2:])
print(json.dumps({
    tokenizer: {
        name: digest(load_examples(name, length=length, samples=samples,
                                   tokenizer=load_tokenizer(tokenizer), essays=essays))
        for name in names
    }
    for tokenizer, length in lengths.items()
}))
"""


@pytest.fixture(scope="session")
def essays(tmp_path_factory) -> str:
    """A text of sentences with nine words each."""
    words = ("time", "river", "stone", "keeps", "moving", "under", "old", "bridges", "slowly")
    sentences = []
    for i in range(400):
        found = [words[(i * 5 + j * (i % 7 + 1)) % len(words)] for j in range(SENTENCE_WORDS)]
        sentences.append(f"{' '.join(found).capitalize()}.")
    path = tmp_path_factory.mktemp("essays") / "essay.txt"
    path.write_text("\n".join(sentences), "utf-8")
    return str(path)


@pytest.fixture(scope="session")
def sets(essays):
    """Examples by (tokenizer, task), built once."""
    found = {}

    def get(tokenizer: str, name: str):
        if (tokenizer, name) not in found:
            found[tokenizer, name] = load_examples(
                name,
                length=LENGTHS[tokenizer],
                samples=SAMPLES,
                tokenizer=load_tokenizer(tokenizer),
                essays=essays,
            )
        return found[tokenizer, name]

    return get


@pytest.mark.parametrize("tokenizer", LENGTHS)
@pytest.mark.parametrize("name", BUILT)
def test_sets_are_the_published_ones(sets, tokenizer, name) -> None:
    assert digest(sets(tokenizer, name)) == DIGESTS[tokenizer][name]


def test_sets_are_the_same_in_another_process_with_another_hash_seed(essays) -> None:
    arguments = [json.dumps(each) for each in (BUILT, {"bytes": LENGTHS["bytes"]}, SAMPLES)]
    found = subprocess.run(
        [sys.executable, "-c", DIGEST_ALL, essays, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout) == {"bytes": DIGESTS["bytes"]}


@pytest.mark.parametrize("tokenizer", LENGTHS)
@pytest.mark.parametrize("name", BUILT)
def test_samples_fill_their_budget(sets, tokenizer, name) -> None:
    length, task = LENGTHS[tokenizer], TASKS[name]
    for index, example in enumerate(sets(tokenizer, name)):
        tokens = len(load_tokenizer(tokenizer).encode(example.prompt))
        assert (example.task, example.index) == (name, index)
        assert example.max_new_tokens == task.max_new_tokens
        assert (example.metadata["length"], example.metadata["prompt_tokens"]) == (length, tokens)
        assert 0.9 * length < tokens + task.max_new_tokens <= length


def test_no_haystack_could_hold_one_piece_more(sets) -> None:
    noise = load_tokenizer("mistral-v1")
    for example in sets("mistral-v1", "niah_single_1"):
        longer = example.prompt.replace(f"\n{NOISE}\n", f"\n{NOISE}\n{NOISE}\n", 1)
        assert len(noise.encode(longer)) + 128 > LENGTHS["mistral-v1"]


def split_prompt(prompt: str) -> tuple[str, str]:
    """Context and question of a needle prompt."""
    _, _, rest = prompt.partition("afterwards.\n")
    context, _, question = rest.rpartition("\n")
    return context, question


@pytest.mark.parametrize("tokenizer", LENGTHS)
@pytest.mark.parametrize("name", NIAH)
def test_needles_are_there_once_at_their_depth(sets, tokenizer, name) -> None:
    for example in sets(tokenizer, name):
        context, question = split_prompt(example.prompt)
        pattern = r"One of the special magic \w+ for (\S+) is: (\S+)\."
        needles = {value: key for key, value in re.findall(pattern, context)}
        assert len(set(example.answers)) == len(example.answers)
        assert set(example.answers) <= set(needles)
        for value, depth in zip(example.answers, example.metadata["depths"], strict=True):
            assert example.prompt.count(value) == 1
            assert needles[value] in question
            before = context.partition(value)[0]
            if name in ("niah_multikey_2", "niah_multikey_3"):
                place, pieces = before.count("\n"), len(needles) - 1
            elif name == "niah_single_1":
                place, pieces = before.count(NOISE), context.count(NOISE)
            else:
                place, pieces = before.count(".") - len(re.findall(pattern, before)), None
                words = len(re.sub(pattern, "", context).split())
                pieces = -(-words // SENTENCE_WORDS)  # the last sentence may be cut
            assert place == pieces * depth // 100
            assert depth in DEPTHS


def test_the_eight_needle_tasks_ask_what_ruler_asks(sets) -> None:
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    word, number = r"[a-z]+-[a-z]+", r"[1-9][0-9]{6}"
    expected = {  # keys, values, needles (None: many), answers, queries
        "niah_single_1": (word, number, 1, 1, 1),
        "niah_single_2": (word, number, 1, 1, 1),
        "niah_single_3": (word, uuid, 1, 1, 1),
        "niah_multikey_1": (word, number, 4, 1, 1),
        "niah_multikey_2": (word, number, None, 1, 1),
        "niah_multikey_3": (uuid, uuid, None, 1, 1),
        "niah_multivalue": (word, number, 4, 4, 1),
        "niah_multiquery": (word, number, 4, 4, 4),
    }
    for name, (key, value, needles, answers, queries) in expected.items():
        for example in sets("mistral-v1", name):
            context, question = split_prompt(example.prompt)
            found = re.findall(rf" for ({key}) is: ({value})\.", context)
            assert len(found) == context.count("One of the special magic") == len(set(found))
            assert len(found) == needles or (needles is None and len(found) > 5)
            assert len({k for k, _ in found}) == (1 if name == "niah_multivalue" else len(found))
            assert len(example.answers) == answers
            asked = question.partition(" for ")[2].partition(" mentioned")[0]
            keys = re.split(r", and |, ", asked)
            assert len(set(keys)) == queries
            # The answers stand in the order of the question.
            order = [dict(map(reversed, found))[answer] for answer in example.answers]
            assert list(dict.fromkeys(order)) == keys
            one = answers == 1
            kind = "uuid" if value == uuid else "number"
            assert question.endswith(
                f"The special magic {kind} for {asked} mentioned in the provided text is"
                if one
                else f"The special magic {kind}s for {asked} mentioned in the provided text are"
            )


def test_depths_are_rulers_and_each_occurs(essays) -> None:
    assert len(DEPTHS) == 40 and DEPTHS[:4] == (0, 3, 5, 8) and DEPTHS[-1] == 100
    examples = load_examples(
        "niah_single_1", length=1200, samples=400, tokenizer=load_tokenizer("bytes")
    )
    counts = collections.Counter(example.metadata["depths"][0] for example in examples)
    assert set(counts) == set(DEPTHS)
    # 40 equally likely depths: 62.4 is the 99th percentile of chi squared, 39 degrees of freedom.
    assert sum((count - 10) ** 2 / 10 for count in counts.values()) < 62.4


def test_samples_depend_on_their_own_key_alone(sets, essays) -> None:
    tokenizer = load_tokenizer("bytes")
    options = {"length": LENGTHS["bytes"], "tokenizer": tokenizer, "essays": essays}
    for name in BUILT:
        assert load_examples(name, samples=1, **options)[0] == sets("bytes", name)[0]
        other = load_examples(name, samples=1, seed=1, **options)[0]
        prompts = {example.prompt for example in (*sets("bytes", name), other)}
        assert len(prompts) == SAMPLES + 1


@pytest.mark.parametrize("tokenizer", LENGTHS)
def test_variable_tracking_can_be_followed(sets, tokenizer) -> None:
    for example in sets(tokenizer, "vt"):
        worked, question = example.prompt.split("\n\nMemorize")
        for text, answers in (
            (worked, worked.rpartition("they are: ")[2].split()),
            (question, list(example.answers)),
        ):
            value = re.search(r"assigned the value (\d{5}) in", text)[1]
            found, wanted = [], value
            while match := re.search(rf"^VAR (\w+) = {wanted}$", text, re.M):
                found.append(match[1])
                wanted = f"VAR {match[1]}"
            assert found == answers and len(set(found)) == 5
        assert example.prompt.endswith("they are:")
        assert not set(example.answers) & set(worked.split())
        place = [question.split(f"VAR {name} =")[0].count(NOISE) for name in example.answers]
        lines = question.count(NOISE)
        assert place == [lines * depth // 100 for depth in example.metadata["depths"]]


@pytest.mark.parametrize("tokenizer", LENGTHS)
def test_common_words_are_the_most_frequent(sets, tokenizer) -> None:
    for example in sets(tokenizer, "cwe"):
        worked, question = example.prompt.split("\nBelow")
        worked, _, shown = worked.rpartition("in the list are:")
        seen = set()
        for text, answers in ((worked, re.findall(r"[a-z]+", shown)), (question, example.answers)):
            entries = re.findall(r"(\d+)\. ([a-z]+)", text.partition("often.\n")[2])
            assert [int(number) for number, _ in entries] == [*range(1, len(entries) + 1)]
            counts = collections.Counter(word for _, word in entries)
            top = counts.most_common(11)
            assert {word for word, _ in top[:10]} == set(answers) and len(answers) == 10
            assert top[9][1] > top[10][1]
            assert not seen & set(counts)
            seen |= set(counts)


@pytest.mark.parametrize("tokenizer", LENGTHS)
def test_frequent_words_follow_a_zeta_distribution(sets, tokenizer) -> None:
    for example in sets(tokenizer, "fwe"):
        text = example.prompt.partition("coded words. ")[2].partition("\nQuestion")[0]
        counts = collections.Counter(text.split()).most_common()
        assert counts[0][0] == "..."
        assert tuple(word for word, _ in counts[1:4]) == example.answers
        assert counts[3][1] > counts[4][1]
        for rank in (2, 3, 4):
            assert counts[rank - 1][1] == pytest.approx(counts[0][1] / rank**2, abs=1)


def test_very_long_lists_get_more_words_than_there_are(monkeypatch) -> None:
    words = word_lists()["verb"]
    monkeypatch.setattr(synthetic, "vocabulary", lambda: words)
    (example,) = load_examples("cwe", length=60_000, samples=1, tokenizer=load_tokenizer("bytes"))
    found = set(re.findall(r"\d+\. ([a-z-]+)", example.prompt))
    assert len(found) > len(words)
    assert example.metadata["prompt_tokens"] > 0.995 * 60_000


@settings(max_examples=60, deadline=None)
@given(
    grow=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
    room=st.integers(0, 5000),
    most=st.none() | st.integers(1, 200),
)
def test_the_largest_haystack_that_fits_is_found(grow, room, most) -> None:
    """Whatever the sizes of the pieces, which may even be empty."""
    grow = [*grow, max(grow)]

    def tokens(size: int) -> int:  # bos and the pieces, taken in turns
        rounds, rest = divmod(size, len(grow))
        return 1 + rounds * sum(grow) + sum(grow[:rest])

    budget = tokens(1) + room
    size, found = fit(
        lambda size: "x" * (tokens(size) - 1),
        tokenizer=load_tokenizer("bytes"),
        budget=budget,
        least=1,
        most=most,
        what="it",
    )
    assert found == tokens(size) <= budget
    assert size == most or tokens(size + 1) > budget


def test_the_standard_library_has_an_essay() -> None:
    essays = load_essays("stdlib")
    assert len(essays.words) > 10_000
    assert " ".join(essays.sentences(5000)).split() == list(essays.words[:5000])


def test_essays_are_repeated_when_they_end(tmp_path) -> None:
    path = tmp_path / "short.json"
    path.write_text(json.dumps({"text": "One two three. Four five"}))
    (example,) = load_examples(
        "niah_single_2",
        length=2000,
        samples=1,
        tokenizer=load_tokenizer("bytes"),
        essays=str(path),
    )
    assert example.prompt.count("One two three.") > 30
    assert 1980 < example.metadata["prompt_tokens"] + 128 <= 2000


def test_wrong_requests_are_named(tmp_path) -> None:
    tokenizer = load_tokenizer("bytes")
    (tmp_path / "empty.txt").write_text(" ")
    for message, name, options in (
        ("Got: 'niah_singel_1'. Did you mean niah_single_1?", "niah_singel_1", {}),
        ("set length and samples. Got: length=None, samples=3", "vt", {"samples": 3}),
        ("set `essays` to a text file", "niah_single_2", {"length": 4096, "samples": 1}),
        ("no such file or folder: essays='nowhere'", "niah_single_2", {"essays": "nowhere"}),
        ("no text in essays=", "niah_single_2", {"essays": str(tmp_path)}),
        ("vt of length 500 needs at least", "vt", {"length": 500}),
        ("ruler_squadqa needs `data`", "ruler_squadqa", {}),
        ("trec needs `data`", "trec", {}),
    ):
        options = options if message.startswith("set") else {"samples": 1, "length": 900, **options}
        options = {"samples": 3} if message.startswith("set length") else options
        with pytest.raises(DataError) as raised:
            load_examples(name, tokenizer=tokenizer, **options)
        assert message in str(raised.value)


def test_draws_are_sha256_in_counter_mode() -> None:
    key = hashlib.sha256(b'["a", 1]').digest()
    blocks = b"".join(hashlib.sha256(key + i.to_bytes(8, "big")).digest() for i in range(3))
    draw = Draw("a", 1)
    words = [draw.bits(64).to_bytes(8, "big") for _ in range(12)]
    assert sorted(words) == sorted(blocks[i : i + 8] for i in range(0, 96, 8))
    assert Draw("a").fork(1).bits(128) == Draw("a", 1).bits(128) != Draw("a", 2).bits(128)


def test_draws_are_even() -> None:
    draw = Draw("even")
    counts = collections.Counter(draw.below(10) for _ in range(10_000))
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 21.7  # 99 %, 9 degrees
    orders = collections.Counter(tuple(draw.shuffled("abc")) for _ in range(6000))
    assert len(orders) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in orders.values()) < 15.1  # 99 %, 5 degrees
    assert sorted(draw.sample(range(50), 50)) == list(range(50))
    with pytest.raises(ValueError, match=r"at most 2 items. Got: 3"):
        draw.sample("ab", 3)


def test_needing_essays_is_known() -> None:
    assert [name for name in TASKS if needs_essays(name)] == [
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multivalue",
        "niah_multiquery",
    ]
