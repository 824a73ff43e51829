"""Decoding with caches against `transformers`: a prefix at once, then token by token, in one compiled loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .families import CASES
from .test_families import compare, converted, fixture, part

NAMES = ["marian", "bart", "t5", "t5_v11"]


@functools.partial(jax.jit, static_argnums=(0, 3))
def decoded(model, params, inputs, prefix):
    """Logits of every target position, the first `prefix` from the call that reads the source."""
    source, valid, ids = inputs["tokens"], inputs["valid"], inputs["decoder_tokens"]
    batch, length = ids.shape

    def call(tokens, ids, start, caches):
        places = jnp.broadcast_to(start + jnp.arange(ids.shape[1])[None], ids.shape)
        out = model.apply({"params": params}, tokens, ids, valid=valid, positions=places, caches=caches)
        return out["caches"], out["logits"]

    # Two slots more than there are positions: what is empty must not be seen.
    caches, first = call(source, ids[:, :prefix], 0, model.init_caches(batch, length + 2))

    def one(caches, i):
        return call(None, jax.lax.dynamic_slice_in_dim(ids, i, 1, axis=1), i, caches)

    _, rest = jax.lax.scan(one, caches, jnp.arange(prefix, length))
    return jnp.concatenate([first, rest[:, :, 0].swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_is_the_reference(name, layer_loop):
    theirs = fixture(name)
    _, _, model, params = converted(theirs, layer_loop)
    inputs = CASES[name].ours(part(theirs, "input"))
    # Padding of a target stands at its end, where it changes nothing before it.
    shown = inputs.pop("decoder_valid", None)
    compare(decoded(model, params, inputs, 1 if layer_loop == "loop" else 3), theirs["output/logits"], shown)


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_prompts_of_several_lengths(layer_loop):
    """`decoder_valid` hides the slots of a row's padding, here before its target begins."""
    theirs = fixture("t5")
    _, _, model, params = converted(theirs, layer_loop)
    inputs = CASES["t5"].ours(part(theirs, "input"))
    source, valid, ids = inputs["tokens"], inputs["valid"], inputs["decoder_tokens"]
    batch, length = ids.shape
    padded = np.pad(ids, ((0, 0), (2, 0)))
    slots = np.broadcast_to(np.arange(length + 2)[None] >= 2, (batch, length + 2))
    places = np.broadcast_to(np.arange(length + 2, dtype=np.int32)[None], (batch, length + 2))
    out = model.apply(
        {"params": params}, source, padded, valid, slots, places, model.init_caches(batch, length + 2)
    )  # fmt: skip
    # Positions are relative, so that a target two places later has the same logits.
    compare(out["logits"][:, 2:], theirs["output/logits"], None)


@pytest.mark.parity
@pytest.mark.parametrize(("stop", "theirs_stop"), [("sure", "never"), ("likely", False)])
@pytest.mark.parametrize("name", ["gpt2", *NAMES])
def test_beam_search_is_the_references(name, stop, theirs_stop):
    """With none of its special tokens forced or barred."""
    torch = pytest.importorskip("torch")
    from tfm_jax.decode.beam import beam_search

    from .make_fixtures import model_of

    theirs, reference = fixture(name), model_of(name)
    _, _, model, params = converted(theirs)
    ids = theirs["input/input_ids"][:1, :7]
    start, end, new = 3, 7, 8
    rules = {"num_beams": 4, "early_stopping": theirs_stop, "length_penalty": 0.7, "max_new_tokens": new, "do_sample": False,
             "eos_token_id": end, "pad_token_id": 0, "num_return_sequences": 4, "use_cache": False}  # fmt: skip
    reference.generation_config = type(reference.generation_config)(**rules, decoder_start_token_id=start)
    told = {"decoder_input_ids": torch.tensor([[start]])} if name != "gpt2" else {}
    with torch.no_grad():
        want = reference.generate(
            torch.from_numpy(ids), return_dict_in_generate=True, output_scores=True, **told
        )  # fmt: skip
    rows, sources = ([ids[0].tolist()], None) if name == "gpt2" else ([[start]], [ids[0].tolist()])
    (got,) = beam_search(
        model, params, rows, sources=sources, beams=4, max_new=new, length_penalty=0.7, stop=stop, end_id=end
    )  # fmt: skip
    skipped = len(rows[0])
    texts = [[t for t in row[skipped:].tolist() if t not in (0, end)] for row in want.sequences]
    assert [[t for t in h.tokens if t != 0] for h in got] == texts
    np.testing.assert_allclose([h.score for h in got], want.sequences_scores.numpy(), atol=1e-4)
