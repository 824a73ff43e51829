"""Generation with a cache against the whole sequence run again for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.decode import sample
from tfm_jax.decode.beam import beam_search
from tfm_jax.decode.sample import Sampling, filter_logits, generate
from tfm_jax.errors import UserError
from tfm_jax.models.gpt import Model
from tfm_jax.nn.spec import BlockSpec

V, NEW, GREEDY = 61, 9, Sampling(temperature=0)
PROMPTS = [[5, 17, 3, 42, 8], [60], [1, 2, 3]]
# Large weights, so that the likeliest token changes from step to step.
SPECS = {
    "learned": BlockSpec(width=16, heads=4, init_std=0.5),
    "rotary": BlockSpec(width=16, heads=4, kv_heads=2, norm="rms", mlp="gated", init_std=0.5),
}


@functools.cache
def model_and_params(position: str, layer_loop: str = "scan"):
    model = Model(
        SPECS[position], vocab_size=V, max_len=24, layers=2, layer_loop=layer_loop, position=position, output="free"
    )
    return model, jax.jit(lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32)))(jax.random.key(1))["params"]


@functools.cache
def next_logits(position: str, layer_loop: str):
    model, params = model_and_params(position, layer_loop)
    return jax.jit(lambda tokens: model.apply({"params": params}, tokens)["logits"])


def slow_greedy(position: str, layer_loop: str, prompt: list[int], new: int, allowed: int = V) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = next_logits(position, layer_loop)(padded)[0, len(tokens) - 1]
        tokens.append(int(np.argmax(logits[:allowed])))
    return tokens[len(prompt) :]


@functools.cache
def greedy(position: str = "learned", layer_loop: str = "scan"):
    return generate(*model_and_params(position, layer_loop), PROMPTS, max_new=NEW, sampling=GREEDY)


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
@pytest.mark.parametrize("position", SPECS)
def test_greedy_is_the_slow_greedy(position, layer_loop):
    want = [slow_greedy(position, layer_loop, prompt, NEW) for prompt in PROMPTS]
    assert greedy(position, layer_loop) == want
    assert len({token for row in want for token in row}) > 5


def test_rows_do_not_depend_on_their_company():
    assert generate(*model_and_params("learned"), PROMPTS[:1], max_new=NEW, sampling=GREEDY) == greedy()[:1]


def test_end_id_stops_a_row_and_is_left_out():
    whole = greedy()
    end = whole[0][4]
    want = [row[: row.index(end)] if end in row else row for row in whole]
    assert generate(*model_and_params("learned"), PROMPTS, max_new=NEW, sampling=GREEDY, end_id=end) == want
    assert len(want[0]) < NEW


def test_the_loop_ends_with_the_last_row():
    whole, seen = greedy()[0], []
    out = generate(
        *model_and_params("learned"), PROMPTS[:1], max_new=NEW, sampling=GREEDY, end_id=whole[2], on_token=seen.append
    )
    assert out == [whole[: whole.index(whole[2])]]
    jax.effects_barrier()
    assert len(seen) == len(out[0]) + 1


def test_ids_from_allowed_on_are_never_drawn():
    allowed = min(max(row) for row in greedy())
    out = generate(*model_and_params("learned"), PROMPTS, max_new=NEW, sampling=GREEDY, allowed=allowed)
    assert out == [slow_greedy("learned", "scan", prompt, NEW, allowed) for prompt in PROMPTS]
    assert out != greedy() and max(max(row) for row in out) < allowed
    hot = Sampling(temperature=100.0)
    drawn = generate(*model_and_params("learned"), [[1]] * 64, max_new=NEW, sampling=hot, allowed=3)
    assert {token for row in drawn for token in row} == {0, 1, 2}


def test_streaming_emits_the_same_tokens():
    whole = greedy()
    end = whole[0][4]
    seen = []
    out = generate(
        *model_and_params("learned"),
        PROMPTS,
        max_new=NEW,
        sampling=GREEDY,
        end_id=end,
        on_token=lambda ids: seen.append(ids.copy()),
    )
    jax.effects_barrier()
    assert all(ids.shape == (len(PROMPTS),) for ids in seen)
    assert [[int(ids[row]) for ids in seen if ids[row] >= 0] for row in range(len(PROMPTS))] == out
    assert np.all(np.array(seen)[len(out[0]) :, 0] == -1)


def test_one_compilation_for_prompts_of_equal_padded_length():
    model, params = model_and_params("learned")
    run = functools.partial(generate, model, params, max_new=3)
    run([[1, 2, 3]], on_token=lambda ids: None)
    run([[1, 2, 3]])
    count = sample._generate._cache_size()
    for prompt in ([4, 5, 6], [9, 8, 7, 6]):
        for seed in (0, 1):
            run([prompt], seed=seed)
            run([prompt], seed=seed, on_token=lambda ids: None)
    assert sample._generate._cache_size() == count
    run([[1, 2, 3, 4, 5]])
    assert sample._generate._cache_size() == count + 1


def test_padding_gives_way_to_the_models_length():
    """A prompt of 17 would be padded to 32; the model has 24 positions."""
    prompt = list(range(17))
    out = generate(*model_and_params("learned"), [prompt], max_new=7, sampling=GREEDY)
    assert out == [slow_greedy("learned", "scan", prompt, 7)]


def slow_filter(row: np.ndarray, how: Sampling) -> np.ndarray:
    row = row.astype(np.float64) / how.temperature
    order = [int(i) for i in np.argsort(-row)]
    kept = order[: how.top_k] if how.top_k else order
    p = np.exp(row[kept]) / np.exp(row[kept]).sum()
    count = 1 + int(np.sum(np.cumsum(p)[:-1] < how.top_p))
    return np.array([row[i] if i in kept[:count] else -np.inf for i in range(len(row))])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 61, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_filter_against_numpy(temperature, top_k, top_p):
    how = Sampling(temperature, top_k, top_p)
    logits = 2 * jax.random.normal(jax.random.key(2), (4, V))
    want = np.stack([slow_filter(row, how) for row in np.asarray(logits)])
    np.testing.assert_allclose(filter_logits(logits, how), want, rtol=1e-5)
    assert np.all(np.isfinite(want).sum(-1) >= 1)


def test_top_p_keeps_what_reaches_p():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        assert np.flatnonzero(np.isfinite(filter_logits(logits, Sampling(top_p=top_p))[0])).tolist() == kept


def test_what_is_not_allowed_stays_out_of_every_filter():
    logits = jnp.array([[0.0, 1.0, -jnp.inf, -jnp.inf]])
    for how in (Sampling(top_k=3), Sampling(top_p=0.99), Sampling(0.5, 3, 0.9)):
        assert not np.any(np.isfinite(filter_logits(logits, how)[0, 2:]))
        assert np.isfinite(filter_logits(logits, how)[0, 1])


def test_a_seed_reproduces_and_another_differs():
    run = functools.partial(generate, *model_and_params("learned"), PROMPTS, max_new=NEW, sampling=Sampling(2.0))
    first = run(seed=3)
    assert run(seed=3) == first
    assert run(seed=4) != first


def test_draws_fit_the_distribution():
    """4096 rows of the same prompt: how often each first token comes, and each second one after the likeliest."""
    how, prompt, rows = Sampling(temperature=1.5, top_k=6, top_p=0.95), [5, 17, 3], 4096
    out = np.array(generate(*model_and_params("learned"), [prompt] * rows, max_new=2, sampling=how, seed=7))

    def check(tokens: np.ndarray, prefix: list[int]) -> None:
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(prefix)] = prefix
        logits = slow_filter(np.asarray(next_logits("learned", "scan")(padded)[0, len(prefix) - 1]), how)
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        counts = np.bincount(tokens, minlength=V)
        assert np.all(counts[p == 0] == 0)
        error = np.sqrt(len(tokens) * p * (1 - p)) + 1e-9
        assert np.max(np.abs(counts - len(tokens) * p) / error) < 4.5

    check(out[:, 0], prompt)
    likeliest = int(np.bincount(out[:, 0]).argmax())
    check(out[out[:, 0] == likeliest, 1], [*prompt, likeliest])


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([[1]], dict(sampling=Sampling(temperature=-1.0)), "temperature=-1.0: must be at least 0 (0 is greedy)."),
        ([[1]], dict(sampling=Sampling(top_k=-2)), "top_k=-2: must be at least 0 (0 is all)."),
        ([[1]], dict(sampling=Sampling(top_p=0.0)), "top_p=0.0: a probability in (0, 1]."),
        ([[1]], dict(sampling=Sampling(top_p=1.5)), "top_p=1.5: a probability in (0, 1]."),
        ([[1]], dict(max_new=0), "max_new=0: must be at least 1."),
        ([], dict(), "The prompt is empty: give at least one token (the end mark starts a new document)."),
        ([[1], []], dict(), "The prompt is empty: give at least one token (the end mark starts a new document)."),
        (
            [[1], [1] * 20],
            dict(max_new=5),
            "A prompt of 20 tokens and max_new=5 need 25 positions, but model.max_len=24."
            " Ask for at most 4 new tokens, or shorten the prompt.",
        ),
        (
            [[1] * 30],
            dict(max_new=5),
            "A prompt of 30 tokens and max_new=5 need 35 positions, but model.max_len=24."
            " Ask for at most 0 new tokens, or shorten the prompt.",
        ),
    ],
)
def test_errors(prompts, arguments, message):
    with pytest.raises(UserError) as error:
        generate(*model_and_params("learned"), prompts, **(dict(max_new=2) | arguments))
    assert str(error.value) == message


def test_a_prompt_that_sees_both_ways_is_the_slow_one():
    """A prefix language model: the prompt's tokens see each other, what is made sees what stands before it."""
    model, params = model_and_params("rotary")
    logits = jax.jit(lambda tokens, prefix: model.apply({"params": params}, tokens, prefix=prefix)["logits"])
    want = []
    for prompt in PROMPTS:
        tokens, size = np.zeros((1, 24), np.int32), len(prompt)
        tokens[0, :size] = prompt
        for place in range(size, size + NEW):
            tokens[0, place] = np.argmax(logits(tokens, jnp.array([size]))[0, place - 1])
        want.append(tokens[0, size : size + NEW].tolist())
    made = generate(model, params, PROMPTS, prefix=True, max_new=NEW, sampling=GREEDY)
    assert made == want and made != greedy("rotary")
    (best,) = beam_search(model, params, PROMPTS[:1], prefix=True, beams=1, max_new=NEW, end_id=V - 1)
    assert best[0].tokens == [t for t in want[0] if t != V - 1][: len(best[0].tokens)] and best[0].tokens
