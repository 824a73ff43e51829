"""Every convertible class against `transformers`, through its conversion table: outputs, loss and gradients, float32."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax import config as configs
from tfm_jax.convert import huggingface
from tfm_jax.convert.weights import read_params, write_tensors_of
from tfm_jax.losses.cross_entropy import cross_entropy
from tfm_jax.sections import build_model

from .families import CASES
from .make_fixtures import FOLDER, compute, load

WITH_GRADIENTS = [name for name, case in CASES.items() if case.loss is not None]


def part(arrays, kind):
    return {name.removeprefix(f"{kind}/"): x for name, x in arrays.items() if name.startswith(f"{kind}/")}


@functools.cache
def fixture(name):
    return load(FOLDER / f"{name}.npz")


def converted(theirs, layer_loop="loop"):
    """The conversion, our section, model and parameters of a fixture."""
    config = json.loads(str(theirs["config"]))
    conversion = huggingface.find(config)
    section = huggingface.read_section(conversion, config, where="the fixture")
    section = configs.resolve(
        {"model": section | {"layer_loop": layer_loop}, "data": {"source": "stdlib"}, "train": {"steps": 1}}
    )["model"]
    model = build_model(section)
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]
    return conversion, section, model, read_params(conversion, section, abstract, part(theirs, "weight"), where="it")


def compare(got, want, shown, atol=1e-4):
    """Where `shown` (B, T) is true; outputs without a length are compared whole."""
    got, want = np.asarray(got), np.asarray(want)
    if shown is not None and want.shape[:2] == shown.shape:
        got, want = got[shown], want[shown]
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def check_outputs(name, theirs, layer_loop="loop"):
    case = CASES[name]
    _, _, model, params = converted(theirs, layer_loop)
    inputs = case.ours(part(theirs, "input"))
    out = jax.jit(lambda params: model.apply({"params": params}, **inputs))(params)
    shown = theirs.get("input/decoder_attention_mask", theirs.get("input/attention_mask"))
    for their_name, our_name in case.outputs.items():
        key, _, column = our_name.partition(":")
        ours = out[key][..., int(column)] if column else out[key]
        compare(ours, theirs[f"output/{their_name}"], None if shown is None else shown.astype(bool))


def check_gradients(name, theirs):
    case = CASES[name]
    conversion, section, model, params = converted(theirs)
    inputs, ids = case.ours(part(theirs, "input")), theirs["input/input_ids"]
    mask = theirs["input/attention_mask"].astype(np.float32)

    def loss_of(params):
        logits = model.apply({"params": params}, **inputs)["logits"]
        if case.kind == "next":
            logits, targets, weights = logits[:, :-1], ids[:, 1:], mask[:, 1:]
        elif case.kind == "decoder":
            targets, weights = theirs["input/decoder_input_ids"], np.ones(logits.shape[:2], np.float32)
        else:
            targets, weights = ids, mask
        losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), jnp.asarray(targets.reshape(-1)))
        return jnp.sum(losses * weights.reshape(-1)) / np.sum(weights)

    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(params)
    np.testing.assert_allclose(loss, theirs["loss"], rtol=1e-5)
    _, make = write_tensors_of(conversion, section, gradients)
    for key, want in part(theirs, "gradient").items():
        if key in conversion.ties(section):
            continue
        known = ~np.isnan(want)
        # Relative to the array's largest: a key bias has no gradient at all, only rounding.
        atol = 1e-4 * np.max(np.abs(want[known])) + 1e-6
        np.testing.assert_allclose(make(key)[known], want[known], rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_references(name, layer_loop):
    check_outputs(name, fixture(name), layer_loop)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_are_the_references(name):
    check_gradients(name, fixture(name))


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
@pytest.mark.parametrize("name", CASES)
def test_import_then_export_gives_the_same_bytes(name, layer_loop):
    theirs = fixture(name)
    conversion, section, _, params = converted(theirs, layer_loop)
    shapes, make = write_tensors_of(conversion, section, params)
    weights = part(theirs, "weight")
    skipped = set(weights) - set(shapes)
    assert not skipped - set(conversion.ties(section)), skipped
    for key in shapes:
        assert shapes[key] == weights[key].shape and make(key).tobytes() == weights[key].tobytes(), key
    # And the config says the same when it is read again.
    assert huggingface.best(section, prefer=conversion.architecture) == conversion


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_live(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    now = compute(name)
    check_outputs(name, now)
    if CASES[name].loss is not None:
        check_gradients(name, now)
    committed = fixture(name)
    assert set(now) == set(committed)
    for key, x in committed.items():
        if key != "config":
            known = ~np.isnan(x)
            np.testing.assert_allclose(now[key][known], x[known], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_an_export(name, tmp_path):
    """Through the command: their folder, a run, a folder again, and their class reads it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from experiments.convert import bring_in, give_back

    from .make_fixtures import model_of

    case, model = CASES[name], model_of(name)
    model.save_pretrained(tmp_path / "theirs")
    bring_in(tmp_path / "theirs", tmp_path / "run")
    give_back(tmp_path / "run", tmp_path / "again")
    again, info = getattr(transformers, case.architecture).from_pretrained(
        tmp_path / "again", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    inputs = {k: torch.from_numpy(x) for k, x in part(fixture(name), "input").items()}
    with torch.no_grad():
        ours, theirs = again.eval()(**inputs), model(**inputs)
    for key in case.outputs:
        assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
