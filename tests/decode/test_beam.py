"""Beam search against a slow one that runs every hypothesis again as a whole, and against sums over all texts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.decode.beam import beam_search
from tfm_jax.decode.sample import Sampling, generate
from tfm_jax.models import bart, encdec, gpt, t5
from tfm_jax.nn.spec import BlockSpec

V, END, START, NEW = 11, 1, 2, 6
SOURCES = [[3, 4, 5, 6], [7, 8], [9, 10, 3, 4, 5, 5, 5]]
SIZE = dict(vocab_size=V, encoder_layers=1, decoder_layers=2)


@functools.cache
def made(name, layer_loop="loop"):
    """A model whose weights are large, so that its choices differ from step to step, and its parameters."""
    if name == "gpt":
        spec = BlockSpec(width=16, heads=2, init_std=0.6)
        model = gpt.Model(spec, vocab_size=V, max_len=16, layers=2, layer_loop=layer_loop, output="free")
    else:
        module = {"encdec": encdec, "bart": bart, "t5": t5}[name]
        spec = {**module.Model.__dataclass_fields__["block"].default.__dict__, "width": 16, "heads": 2, "mlp_width": 24}
        spec |= {"init_std": 0.6, "dropout": 0.0, "head_dim": None}
        limit = {} if name == "t5" else {"max_len": 16}
        model = module.Model(BlockSpec(**spec), **SIZE, **limit, layer_loop=layer_loop)
    params = jax.jit(lambda key: model.init(key, **model.example()))(jax.random.key(4))["params"]
    return model, jax.tree.map(lambda x: x * 3.0 if x.ndim > 1 else x, params)


@functools.cache
def whole(name, layer_loop):
    """Log-probabilities of the token behind a prefix, by the model without caches."""
    model, params = made(name, layer_loop)

    @jax.jit
    def logits(source, valid, tokens):
        if name == "gpt":
            return model.apply({"params": params}, tokens)["logits"]
        return model.apply({"params": params}, source, tokens, valid=valid)["logits"]

    @functools.cache
    def run(source, prefix):
        ids, valid, tokens = np.zeros((1, 8), np.int32), np.zeros((1, 8), bool), np.zeros((1, 16), np.int32)
        ids[0, : len(source)], valid[0, : len(source)], tokens[0, : len(prefix)] = source, True, prefix
        found = np.asarray(logits(ids, valid, tokens), np.float64)[0, len(prefix) - 1]
        return found - np.log(np.sum(np.exp(found - found.max()))) - found.max()

    return run


def slow(name, source, prompt, beams, penalty, new=NEW, layer_loop="loop", stop="likely"):
    """The same search with lists of hypotheses: [(score, tokens)], best first."""
    logp, live, finished = whole(name, layer_loop), [(0.0, ())], []
    for step in range(1, new + 1):
        grown = []
        for score, tokens in live:
            found = logp(tuple(source), (*prompt, *tokens))
            grown += [(score + found[token], (*tokens, token)) for token in range(V)]
        grown.sort(key=lambda pair: -pair[0])
        finished += [(score / step**penalty, tokens[:-1]) for score, tokens in grown[:beams] if tokens[-1] == END]
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        live = [pair for pair in grown[: 2 * beams] if pair[1][-1] != END][:beams]
        length = step + 1 if penalty <= 0 else new if stop == "sure" else step
        bound = live[0][0] / length**penalty
        if step < new and len(finished) == beams and bound <= finished[-1][0]:
            return finished
    finished += [(score / new**penalty, tokens) for score, tokens in live]
    return sorted(finished, key=lambda pair: -pair[0])[:beams]


def prompts_of(name):
    return [[5, 3, 7], [4], [9, 9]] if name == "gpt" else [[START]] * 3


def cases():
    """Every model with every number of beams and every penalty; all three at once are for `make journeys`."""
    axes = [("gpt", "sure"), ("encdec", "likely"), ("t5", "sure")], [1, 2, 5], [0.0, 1.0, -0.5]
    for place in itertools.product(range(3), repeat=3):
        (name, stop), beams, penalty = (axis[i] for axis, i in zip(axes, place, strict=True))
        marks = () if sum(place) % 3 == 0 else pytest.mark.journey
        yield pytest.param(name, stop, beams, penalty, marks=marks)


@pytest.mark.parametrize(("name", "stop", "beams", "penalty"), [*cases()])
def test_it_is_the_slow_search(name, stop, beams, penalty):
    sources = None if name == "gpt" else SOURCES
    got = beam_search(
        *made(name), prompts_of(name), sources=sources, beams=beams, max_new=NEW, length_penalty=penalty, stop=stop,
        end_id=END,
    )  # fmt: skip
    for i, rows in enumerate(got):
        want = slow(name, SOURCES[i] if sources else (), prompts_of(name)[i], beams, penalty, stop=stop)
        assert [tuple(row.tokens) for row in rows] == [tokens for _, tokens in want]
        np.testing.assert_allclose([row.score for row in rows], [score for score, _ in want], atol=1e-4)


@pytest.mark.parametrize("name", ["bart", pytest.param("gpt", marks=pytest.mark.journey)])
def test_scanned_layers_and_company_change_nothing(name):
    sources = None if name == "gpt" else SOURCES
    model, params = made(name, "scan")
    rows = prompts_of(name)
    got = beam_search(model, params, rows, sources=sources, beams=3, max_new=NEW, end_id=END)
    for i, row in enumerate(got):
        want = slow(name, SOURCES[i] if sources else (), rows[i], 3, 1.0, layer_loop="scan")
        assert [tuple(h.tokens) for h in row] == [tokens for _, tokens in want]
        alone = beam_search(
            model, params, rows[i : i + 1], sources=sources and sources[i : i + 1], beams=3, max_new=NEW, end_id=END
        )
        assert [h.tokens for h in alone[0]] == [h.tokens for h in row]


def test_with_enough_beams_it_finds_the_likeliest_of_all_texts():
    """Three tokens at most: 5 beams do not prune what matters, and every text can be looked at."""
    logp, new = whole("encdec", "loop"), 2
    every = []
    for length in (1, 2):
        for tokens in itertools.product([t for t in range(V) if t != END], repeat=length - 1):
            for last in range(V):
                if length < new and last != END:
                    continue
                text = (*tokens, last)
                score = sum(logp(tuple(SOURCES[0]), (START, *text[:i]))[t] for i, t in enumerate(text))
                every.append((score / length, tuple(t for t in text if t != END)))
    best = max(every)
    (found,) = beam_search(*made("encdec"), [[START]], sources=SOURCES[:1], beams=5, max_new=new, end_id=END)
    assert tuple(found[0].tokens) == best[1] and found[0].score == pytest.approx(best[0], abs=1e-4)


@pytest.mark.parametrize("name", ["encdec", pytest.param("bart", marks=pytest.mark.journey), "t5"])
def test_greedy_encoder_decoders_are_the_slow_greedy(name):
    got = generate(
        *made(name), [[START]] * 3, sources=SOURCES, max_new=NEW, sampling=Sampling(temperature=0), end_id=END
    )
    for source, row in zip(SOURCES, got, strict=True):
        tokens = []
        while len(tokens) < NEW:
            token = int(np.argmax(whole(name, "loop")(tuple(source), (START, *tokens))))
            if token == END:
                break
            tokens.append(token)
        assert row == tokens


def test_an_encoder_decoder_draws_what_the_model_without_caches_draws():
    """With the same keys; rows that have ended draw on, unheard."""
    run = functools.partial(generate, *made("encdec"), [[START]] * 3, sources=SOURCES, max_new=NEW, end_id=END)
    rows, done, key = [[], [], []], set(), jax.random.key(5)
    for step in range(NEW):
        logits = [whole("encdec", "loop")(tuple(s), (START, *row)) for s, row in zip(SOURCES, rows, strict=True)]
        drawn = jax.random.categorical(jax.random.fold_in(key, step), jnp.asarray(np.stack(logits), jnp.float32))
        done |= {i for i, token in enumerate(drawn) if token == END}
        for i in {0, 1, 2} - done:
            rows[i].append(int(drawn[i]))
    assert run(sampling=Sampling(temperature=1.0), seed=5) == rows != run(sampling=Sampling(temperature=0))


def test_ids_that_are_not_allowed_never_come():
    found = beam_search(*made("t5"), [[START]] * 3, sources=SOURCES, beams=3, max_new=NEW, end_id=END, allowed=8)
    assert max(max(h.tokens, default=0) for row in found for h in row) < 8


def test_bad_input():
    model, params = made("encdec")
    for message, changes in (
        ("beams=0: must be at least 1.", {"beams": 0}),
        ("beams=6: too many for the 11 tokens there are, of which 1 end a text.", {"beams": 6}),
        ("The source is empty: an encoder needs at least one token.", {"sources": [[]]}),
        ("The source has the id 99, but model.vocab_size=11.", {"sources": [[99]]}),
        ("A source of 17 tokens is longer than model.max_len=16.", {"sources": [[3] * 17]}),
        ("max_new=0: must be at least 1.", {"max_new": 0}),
    ):
        with says(message):
            beam_search(model, params, [[START]], **{"sources": [[3]], "max_new": 3, "end_id": END, **changes})
