"""Masked tokens and pairs of segments: the sum against slow numpy, both questions learnt where they can be, bad input."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.data.vocabularies import open_tokenizer
from tfm_jax.tasks import masked_pairs
from tfm_jax.train.build import build
from tfm_jax.train.run import train


def test_the_loss_against_numpy():
    draw = np.random.default_rng(0)
    logits, pairs = draw.normal(size=(4, 5, 7)).astype(np.float32), draw.normal(size=(4, 2)).astype(np.float32)
    tokens, pair = draw.integers(0, 7, (4, 5)), np.array([0, 1, 1, 0])
    weights = draw.integers(0, 2, (4, 5)).astype(np.float32)
    weights[2] = 0

    def apply(params, **inputs):
        return {"logits": jnp.asarray(logits), "pair_logits": jnp.asarray(pairs)}

    batch = {"inputs": {}, "targets": {"tokens": jnp.asarray(tokens), "pair": jnp.asarray(pair)},
             "weights": jnp.asarray(weights)}  # fmt: skip
    out = masked_pairs.make(pair_weight=0.5).loss(apply, {}, {}, batch, None, True)

    def nll(x, target):
        return np.log(np.exp(x).sum()) - x[target]

    want, hits = 0.0, []
    for row in range(4):
        want += sum(weights[row, t] * nll(logits[row, t], tokens[row, t]) for t in range(5))
        want += 0.5 * weights[row].sum() * nll(pairs[row], pair[row])
        hits += [pairs[row].argmax() == pair[row]] if weights[row].any() else []
    assert float(out.total) == pytest.approx(want, rel=1e-5) and float(out.weight) == weights.sum()
    right, count = out.metrics["pair_accuracy"]
    assert float(right) == sum(hits) and float(count) == len(hits) < 4


def config(corpus, base, objective, **changes):
    model = {"name": "bert", "variant": "mini", "layers": 1, "width": 32, "heads": 2, "max_len": 32,
             "outputs": ("tokens", "pair")}  # fmt: skip
    raw = {
        "model": model, "task": {"name": "masked_pairs"}, "train": {"steps": 3},
        "data": {"source": f"text:{corpus}/*.txt", "tokenizer": f"file:{base}", "seq_len": 32, "batch_size": 8,
                 "objective": objective},
        "optim": {"warmup_steps": 1}, "evals": {"validation": {"split": "validation"}}, "log": {"tensorboard": False},
    }  # fmt: skip
    for key, value in changes.items():
        raw[key] = {**raw[key], **value}
    return configs.resolve(raw)


def with_marks(source, asked, root):
    """A WordPiece vocabulary with marks that tell segments apart."""
    from tokenizers import Tokenizer
    from tokenizers.processors import BertProcessing

    from tfm_jax.data.sources import open_source

    found = open_tokenizer(asked, open_source(source, cache_dir=root), root)
    engine = Tokenizer.from_str(found.json)
    end = found.end_id
    mark = engine.id_to_token(end)
    engine.post_processor = BertProcessing((mark, end), (mark, end))
    path = root / "tokenizer.json"
    path.write_text(engine.to_str())
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return with_marks(f"text:{corpus}/*.txt", "wordpiece:120", tmp_path_factory.mktemp("pairs"))


def test_a_run(corpus, tokenizer, tmp_path):
    # A document alone has no strangers to follow it.
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copy(folder / "valid.txt", folder / "more_valid.txt")
    result = train(config(folder, tokenizer, "follow"), tmp_path / "run").result
    assert 0 <= result["eval/validation/pair_accuracy"] <= 1 and np.isfinite(result["eval/validation/token_loss"])


LETTERS = list("abcdefghijkl")


@pytest.mark.journey
@pytest.mark.parametrize(("objective", "least"), [("order", 0.95), ("follow", 0.75)])
def test_what_can_be_told_is_learnt(tmp_path, objective, least):
    """Documents whose letters ascend tell which half was first; of those of one topic in four, three strangers of four are
    told from what follows, a ceiling of 7/8."""
    draw = np.random.default_rng(0)

    def document():
        if objective == "order":
            return sorted(draw.choice(LETTERS, 40))
        topic = 3 * draw.integers(4)
        return draw.choice(LETTERS[topic : topic + 3], 40)

    for split, count in (("train", 2000), ("valid", 100)):
        lines = [json.dumps({"text": " ".join(document())}) for _ in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    source = f"jsonl:{tmp_path}/*.jsonl"
    base = with_marks(source, "wordpiece:40", tmp_path)
    asked = {
        "data": {"source": source, "batch_size": 32},
        "train": {"steps": 400},
        "optim": {"warmup_steps": 10, "lr": 3e-3},
    }
    result = train(config(tmp_path, base, objective, **asked), tmp_path / "run").result
    assert result["eval/validation/pair_accuracy"] >= least


def test_bad_input(corpus, tokenizer):
    def loss(objective="order", **changes):
        built = build(config(corpus, tokenizer, objective, **changes))
        batch = built.data.train.batch_at(0)
        state = built.fresh_state()
        return built.task.loss(lambda params, **inputs: built.model.apply({"params": params}, **{
            k: v for k, v in inputs.items() if k != "rngs"}), state.params, {}, batch, None, True)  # fmt: skip

    with says("task.name=masked_pairs needs pairs of segments: data.objective=order or follow."):
        loss(objective="mask")
    with says(
        "task.name=token_prediction wants no pairs of segments (data.objective=order or follow): set task.name='masked_pairs'."
    ):
        loss(task={"name": "token_prediction"})
    with says("task.name=masked_pairs needs a model with model.outputs=('tokens', 'pair')."):
        loss(model={"outputs": ("tokens",)})
