"""Generation: equal to full forward passes, whatever stands in the batch and wherever it is cut.

LaCT's chunks have 8 tokens here, so that 200 tokens cross 25 of their boundaries.
"""

import contextlib
import dataclasses
import functools
import json

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import scaled, tiny, tokens

from refine_jax.base.errors import CheckpointError, DataError
from refine_jax.checkpoint.hf import read_hf
from refine_jax.generation import (
    CopiesGenerator,
    Generator,
    Sampler,
    Sampling,
    decode,
    load_prefix,
    row_keys,
    save_prefix,
    take_rows,
)
from refine_jax.models.config import model_config
from refine_jax.models.head import logits
from refine_jax.models.transformer import ComputePolicy, Model

FAMILIES = ["lact", "deltanet", "gated_deltanet", "qwen"]
PROMPTS = [tokens(1, 5), tokens(2, 30), tokens(3, 17)]
DRAWN = Sampling(temperature=1.0, max_new_tokens=24, seed=5)


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer with a character for each id."""

    vocab_size: int = 53
    eos_id: int | None = None
    name = "letters"
    bos_id = None

    @property
    def end_ids(self):
        return () if self.eos_id is None else (self.eos_id,)

    @property
    def fingerprint(self):
        return f"letters-{self.vocab_size}-{self.eos_id}"

    def decode(self, ids):
        return "".join(chr(ord("A") + i) for i in ids)


@functools.cache
def generator(name, **options):
    model, params = tiny(name)
    eos_id = options.pop("eos_id", None)
    return Generator(model, Letters(eos_id=eos_id), **options), params


@functools.cache
def read(name):
    made, params = generator(name)
    return made.read(params, PROMPTS)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, rows):
    return model.forward(params, rows)[0]


@contextlib.contextmanager
def no_compilation():
    """Fails if a program is compiled inside."""
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_the_argmax_of_whole_forward_passes(name):
    """200 tokens after each of three prompts of unequal length, in one batch."""
    made, params = generator(name)
    results = made.generate(params, read(name), Sampling(max_new_tokens=200))
    rows = [np.concatenate([p, r.tokens]) for p, r in zip(PROMPTS, results, strict=True)]
    # The models are causal: what fills a row up changes nothing before it.
    filled = np.stack([np.pad(row, (0, 230 - len(row))) for row in rows]).astype(np.int32)
    hidden = forward(made.model, params, filled)
    z = np.asarray(logits(hidden, made.model.head(params)))
    clear = 0
    for row, prompt, result in zip(z, PROMPTS, results, strict=True):
        assert len(result.tokens) == 200
        before = row[len(prompt) - 1 :][:200]
        best = np.sort(before, axis=-1)
        taken = before[np.arange(200), result.tokens]
        # Where two logits agree to rounding, either may be taken.
        assert (best[:, -1] - taken <= 2e-4).all()
        clear += (best[:, -1] - best[:, -2] > 4e-4).sum()
    assert clear > 590


@pytest.mark.parametrize("folder", ["lact_base", "deltanet_base", "gated_deltanet_base"])
def test_greedy_tokens_of_the_reference_implementation(folder):
    loaded = read_hf(goldens.require(folder))
    expected = goldens.load_arrays(folder, "expected.npz")
    model = Model(model_config(loaded.config), ComputePolicy())
    made = Generator(model, Letters(97))
    params = jax.tree.map(jnp.asarray, loaded.params)
    prefix = made.read(params, [expected[f"greedy/prompt{j}"] for j in (0, 1)])
    for j, result in enumerate(made.generate(params, prefix, Sampling(max_new_tokens=20))):
        assert result.tokens == tuple(expected[f"greedy/tokens{j}"])


def test_a_row_does_not_depend_on_its_batch():
    name = "lact"
    made, params = generator(name)
    together = made.generate(params, read(name), DRAWN, ids=[7, 8, 9])
    assert len({result.text for result in together}) == 3
    order = [2, 0, 1]
    shuffled = made.read(params, [PROMPTS[row] for row in order])
    results = made.generate(params, shuffled, DRAWN, ids=[7 + row for row in order])
    assert results == [together[row] for row in order]
    alone = made.generate(params, made.read(params, PROMPTS[1:2]), DRAWN, ids=[8])
    assert alone == together[1:2]
    # Of one prefix many rows can be made; their ids tell them apart.
    copies = take_rows(read(name), np.array([1, 1, 1]))
    drawn = made.generate(params, copies, DRAWN, ids=[8, 9, 8])
    assert drawn[0] == drawn[2] == together[1] != drawn[1]
    other = made.generate(params, copies, dataclasses.replace(DRAWN, seed=6), ids=[8, 9, 8])
    assert other[0] != drawn[0]


def test_other_numbers_and_lengths_need_no_other_program():
    made, params = generator("deltanet")
    made.generate(params, made.read(params, PROMPTS), DRAWN)
    with no_compilation():
        prefix = made.read(params, [tokens(8, 64), tokens(9, 1), tokens(10, 40)])
        for sampling in (
            Sampling(temperature=0.3, top_k=4, top_p=0.5, max_new_tokens=40, seed=9),
            Sampling(max_new_tokens=3, stop=("A", "BC")),
        ):
            made.generate(params, prefix, sampling, max_new_tokens=[1, 7, 3], ids=[5, 6, 7])
            list(made.stream(params, prefix, sampling))


@pytest.mark.parametrize("name", FAMILIES)
def test_reading_in_pieces_is_reading_at_once(name):
    """Continued by texts of unequal length; the states that they continue stay as they are."""
    made, params = generator(name)
    whole = [tokens(4, 61), tokens(5, 20), tokens(6, 14)]
    want = made.read(params, whole)
    greedy = made.generate(params, want, Sampling(max_new_tokens=20))
    cuts = [3, 8, 14]
    begun = made.read(params, [row[:cut] for row, cut in zip(whole, cuts, strict=True)])
    before = jax.tree.map(np.asarray, begun)
    rests = [row[cut:] for row, cut in zip(whole, cuts, strict=True)]
    got = made.extend(params, begun, rests)
    np.testing.assert_array_equal(got.length, [61, 20, 14])
    np.testing.assert_allclose(got.hidden, want.hidden, atol=1e-4)
    assert made.generate(params, got, Sampling(max_new_tokens=20)) == greedy
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, begun))


@pytest.mark.parametrize("name", ["deltanet", "qwen"])
def test_prompts_of_very_different_lengths_keep_their_order(name):
    """Read in groups of similar lengths, of no more tokens at once than allowed, and in pieces."""
    made, params = generator(name, prefill_tokens=256)
    lengths = np.array([3, 256 + 512 + 64 + 8, 40, 256 + 64 + 1, 64])
    prompts = [tokens(i, size) for i, size in enumerate(lengths)]
    prefix = made.read(params, prompts)
    np.testing.assert_array_equal(prefix.length, lengths)
    filled = np.stack([np.pad(prompt, (0, 840 - len(prompt))) for prompt in prompts])
    want = np.asarray(forward(made.model, params, filled))[np.arange(5), lengths - 1]
    np.testing.assert_allclose(prefix.hidden, want, atol=1e-4)


def test_blocks_of_tokens_continue_each_other():
    """Draws depend on the tokens before, not on where a block begins; ended rows have none."""
    model, params = tiny("deltanet")
    prefix = read("deltanet")
    keys, sampler = row_keys(3, jnp.arange(3)), Sampler.of(DRAWN)

    @functools.partial(jax.jit, static_argnames="end")
    def run(params, prefix, budgets, end=None):
        return decode(model, params, prefix, keys, sampler, budgets, block=16, end=end)

    whole, after = run(params, prefix, jnp.asarray([16, 16, 16]))
    first, middle = run(params, prefix, jnp.asarray([9, 9, 9]))
    second, end = run(params, middle, jnp.asarray([7, 7, 7]))
    np.testing.assert_array_equal(np.concatenate([first[:, :9], second[:, :7]], 1), whole)
    np.testing.assert_array_equal(first[:, 9:], -1)
    np.testing.assert_array_equal(end.length, after.length)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), end, after)

    last = int(whole[1, 4])
    ended, _ = run(params, prefix, jnp.asarray([16, 16, 2]), end=last)
    for row, budget in enumerate((16, 16, 2)):
        want = [int(token) for token in whole[row][:budget]]
        want = want[: want.index(last) + 1] if last in want else want
        assert [int(token) for token in ended[row] if token >= 0] == want

    # Several parameters at once, as adapted prompts have them.
    other = scaled(params, 1.1)
    both = jax.tree.map(lambda *x: np.stack(x), params, other)
    many, _ = jax.jit(jax.vmap(run, (0, None, None)))(both, prefix, jnp.asarray([6, 6, 6]))
    np.testing.assert_array_equal(many[0, :, :6], whole[:, :6])
    np.testing.assert_array_equal(many[1], run(other, prefix, jnp.asarray([6, 6, 6]))[0])


def test_stop_strings_end_a_row_wherever_blocks_are_cut():
    made, params = generator("lact")
    texts = [r.text for r in made.generate(params, read("lact"), DRAWN)]
    for begin, size in ((14, 4), (0, 1), (15, 2), (22, 2)):
        stop = texts[1][begin : begin + size]
        sampling = dataclasses.replace(DRAWN, stop=("not there", stop))
        for result, text in zip(made.generate(params, read("lact"), sampling), texts, strict=True):
            at = text.find(stop)
            if at < 0:
                assert (result.text, result.finish_reason) == (text, "length")
            else:
                assert (result.text, result.finish_reason) == (text[:at], "stop")
                assert len(result.tokens) == at + size
        streamed = list(made.stream(params, read("lact"), sampling))
        for row, result in enumerate(made.generate(params, read("lact"), sampling)):
            *pieces, end = [piece for index, piece in streamed if index == row]
            assert (end, "".join(pieces)) == (result, result.text)
            assert len(pieces) <= len(result.tokens)


def test_budgets_and_the_end_of_sequence():
    made, params = generator("deltanet")
    free = made.generate(params, read("deltanet"), DRAWN)
    budgets = made.generate(params, read("deltanet"), DRAWN, max_new_tokens=[0, 1, 20])
    assert [r.tokens for r in budgets] == [(), free[1].tokens[:1], free[2].tokens[:20]]
    assert {r.finish_reason for r in budgets} == {"length"}
    end = free[0].tokens[6]
    ending, _ = generator("deltanet", eos_id=end)
    for result, other in zip(ending.generate(params, read("deltanet"), DRAWN), free, strict=True):
        if end in other.tokens:
            assert result.tokens == other.tokens[: other.tokens.index(end) + 1]
            assert result.finish_reason == "eos"
        else:
            assert result == other


def test_a_saved_state_is_the_same_bit_for_bit(tmp_path):
    made, params = generator("lact")
    save_prefix(tmp_path / "state", read("lact"), made.model, params, made.tokenizer)
    loaded = load_prefix(tmp_path / "state", made.model, params, made.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, loaded, read("lact"))
    assert jax.tree.map(jnp.dtype, loaded) == jax.tree.map(jnp.dtype, read("lact"))
    assert made.generate(params, loaded, DRAWN) == made.generate(params, read("lact"), DRAWN)

    with pytest.raises(CheckpointError, match="exists"):
        save_prefix(tmp_path / "state", read("lact"), made.model, params, made.tokenizer)
    refused = functools.partial(load_prefix, tmp_path / "state")
    other = Model(dataclasses.replace(made.model.config, window_size=5))
    with pytest.raises(CheckpointError, match=r"another model.*window_size: 6, not 5"):
        refused(other, params, made.tokenizer)
    with pytest.raises(CheckpointError, match="other parameters"):
        refused(made.model, scaled(params, 1.001), made.tokenizer)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        refused(made.model, params, Letters(eos_id=1))
    low = Model(made.model.config, ComputePolicy(compute_dtype="bfloat16"))
    with pytest.raises(CheckpointError, match="another dtype"):
        refused(low, params, made.tokenizer)
    with pytest.raises(CheckpointError, match="not a saved state"):
        load_prefix(tmp_path, made.model, params, made.tokenizer)
    record = tmp_path / "state/state.json"
    fields = json.loads(record.read_text())
    assert fields.pop("lengths") == [5, 30, 17]
    record.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="lacks 'lengths'"):
        refused(made.model, params, made.tokenizer)


def test_a_saved_state_that_grew_goes_on_growing(tmp_path):
    """Full attention keeps all tokens: the state has room for some, and is given more."""
    made, params = generator("qwen")
    begun = made.extend(params, read("qwen"), [tokens(7, size) for size in (70, 1, 30)])
    rooms = [made.model.capacity(prefix.state) for prefix in (read("qwen"), begun)]
    assert rooms == [64, 128]
    save_prefix(tmp_path / "state", begun, made.model, params, made.tokenizer)
    loaded = load_prefix(tmp_path / "state", made.model, params, made.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, loaded, begun)
    longer = dataclasses.replace(DRAWN, max_new_tokens=80)
    assert made.generate(params, loaded, longer) == made.generate(params, begun, longer)
    record = tmp_path / "state/state.json"
    fields = json.loads(record.read_text())
    for room in (74, -1, 2.5, "128", 10**30, None):
        record.write_text(json.dumps(fields | {"room": room}))
        with pytest.raises(CheckpointError, match="room must be a number of tokens"):
            load_prefix(tmp_path / "state", made.model, params, made.tokenizer)


def test_each_row_is_read_and_continued_by_a_copy_of_its_own():
    made, params = generator("qwen")
    each = [scaled(params, 1 + 0.1 * i) for i in range(3)]
    copies = CopiesGenerator(made.model, made.tokenizer)
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *each)
    got = copies.generate(stacked, copies.read(stacked, PROMPTS), Sampling(max_new_tokens=50))
    for i, prompt in enumerate(PROMPTS):
        prefix = made.read(each[i], [prompt])
        assert made.generate(each[i], prefix, Sampling(max_new_tokens=50)) == got[i : i + 1]


def test_bad_prompts_are_refused():
    made, params = generator("deltanet")
    with pytest.raises(DataError, match="Prompt 1 holds no token"):
        made.read(params, [[1], []])
    with pytest.raises(DataError, match=r"outside the model's vocabulary of 53. Got: 3 to 53"):
        made.read(params, [[3, 53]])
    with pytest.raises(DataError, match="none"):
        made.read(params, [])
    with pytest.raises(DataError, match="2 for 3 rows"):
        made.extend(params, read("deltanet"), [[1], [2]])
    with pytest.raises(DataError, match="one number a row"):
        made.generate(params, read("deltanet"), DRAWN, max_new_tokens=[1])
    with pytest.raises(DataError, match="97"):
        Generator(made.model, Letters(97))
