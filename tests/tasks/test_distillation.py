"""A teacher's parameters are read, placed and never change; the loss is that of the paper; a student comes nearer."""

import functools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.data.test_examples import bert  # noqa: F401 - a fixture
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.data.tokenizers import load_tokenizer
from tfm_jax.data.vocabularies import byte_tokenizer
from tfm_jax.errors import UserError
from tfm_jax.models.albert import Model as AlbertModel
from tfm_jax.models.bert import Model as BertModel
from tfm_jax.models.electra import Model as ElectraModel
from tfm_jax.models.t5 import Model as T5Model
from tfm_jax.models.transformer_xl import Model as TransformerXl
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model
from tfm_jax.tasks import replaced_token, span_extraction, token_prediction
from tfm_jax.tasks.base import bind
from tfm_jax.tasks.distillation import captured, divergence, make
from tfm_jax.train import rundir
from tfm_jax.train.build import build
from tfm_jax.train.restore import _differences, load_params, open_checkpoint, with_donors
from tfm_jax.train.run import train
from tfm_jax.train.state import TrainState

DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def teacher(make_config, tmp_path_factory):
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(make_config({"train.steps": 3, "train.ema": 0.5, "model.layers": 2}), run)
    return run


def student(make_config, teacher, **changes):
    wrapped = {"task.name": "distillation", "task.teacher": f"'{teacher}'", "task.task": "{'name': 'token_prediction'}"}
    return make_config({**wrapped, "model.width": 8, "train.steps": 40, **changes})


def test_the_divergence_is_that_of_the_distributions():
    a, b = DRAW.normal(size=(2, 5, 7))
    p, q = (np.exp(x / 3) / np.sum(np.exp(x / 3), -1, keepdims=True) for x in (a, b))
    want = np.sum(p * np.log(p / q), -1)
    np.testing.assert_allclose(divergence(jnp.asarray(a), jnp.asarray(b), 3.0), want, rtol=1e-4)
    np.testing.assert_allclose(divergence(jnp.asarray(a), jnp.asarray(a), 3.0), 0, atol=1e-6)


def test_the_teacher_is_read_and_never_changes(make_config, teacher, tmp_path):
    """Its average, since it kept one; split over eight devices like everything else."""
    train(student(make_config, teacher, **{"mesh.data": 1, "mesh.fsdp": 8, "train.steps": 3}), tmp_path / "run")
    checkpoints, step = open_checkpoint(tmp_path / "run")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = checkpoints.shapes(step)["extra"]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    kept = checkpoints.restore(step, {"extra": abstract}, partial=True).state["extra"]["teacher"]
    want = load_params(teacher)[0]
    assert flatten(kept).keys() == flatten(want).keys()
    jax.tree.map(np.testing.assert_array_equal, kept, want)
    # What evaluation, generation and export see is the student alone.
    assert load_params(tmp_path / "run")[0]["token_embedding"]["embedding"].shape == (257, 8)


def plain(section):
    return token_prediction.make()


def test_a_student_comes_nearer_to_its_teacher(make_config, teacher):
    """And one that hears it but does not listen stays away: this teacher says nothing that is right."""
    built, narrow = build(make_config()), build(make_config({"model.width": 8}))
    batch, told = built.data.train.batch_at(0), jax.tree.map(lambda x: 5 * x, load_params(teacher)[0])
    model, extra = build_model(rundir.read_config(teacher)["model"]), {"inner": {}, "teacher": told}
    adam = optax.adam(1e-2)

    def apply(params, /, *, train, rngs=None, capture=False, **inputs):
        return narrow.model.apply({"params": params}, **inputs, train=train)

    @functools.partial(jax.jit, static_argnums=1)
    def trained(params, weight):
        task = make(teacher="x", taught_by=model, model=None, build=plain, task={}, temperature=1.0,
                    soft_weight=weight)  # fmt: skip

        def step(carry, _):
            (_, out), grads = jax.value_and_grad(
                lambda p: (lambda out: (out.total, out.metrics))(task.loss(apply, p, extra, batch, None, True)),
                has_aux=True,
            )(carry[0])
            updates, state = adam.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), out["soft_loss"][0] / out["soft_loss"][1]

        return jax.lax.scan(step, (params, adam.init(params)), None, length=150)[1]

    first = jax.jit(narrow.init)().params
    listens, deaf = (np.asarray(trained(first, weight)) for weight in (1.0, 0.0))
    assert listens[0] == pytest.approx(deaf[0], rel=1e-5)
    assert listens[-1] < 0.3 * listens[0] and listens[-1] < 0.3 * deaf[-1], (listens[[0, -1]], deaf[-1])


def test_the_loss_is_the_weighted_sum(make_config, teacher):
    built = build(make_config())
    params, batch = jax.jit(built.init)().params, built.data.train.batch_at(0)
    model, weight, heat = build_model(rundir.read_config(teacher)["model"]), 0.3, 2.5
    told = model.apply({"params": load_params(teacher)[0]}, **batch["inputs"])["logits"]
    extra = {"inner": {}, "teacher": load_params(teacher)[0]}

    def apply(params, /, *, train, rngs=None, capture=False, **inputs):
        return built.model.apply({"params": params}, **inputs, train=train)

    def out(task, train=True):
        return jax.jit(lambda: task.loss(apply, params, extra, batch, None, train))()

    task = make(teacher="x", taught_by=model, model=None, build=plain, task={}, temperature=heat, soft_weight=weight)
    hard = jax.jit(lambda: token_prediction.make().loss(apply, params, {}, batch, None, True))()
    soft = np.sum(divergence(told, apply(params, train=True, **batch["inputs"])["logits"], heat) * batch["weights"])
    want = (1 - weight) * float(hard.total) + weight * heat**2 * float(soft)
    assert float(out(task).total) == pytest.approx(want, rel=1e-5)
    assert float(out(task, False).total) == pytest.approx(float(hard.total), rel=1e-6)


def test_bad_input(make_config, teacher, tmp_path):
    for named in (teacher, teacher / "checkpoints" / "3"):
        with says(
            f"task.teacher={str(named)!r} reads other ids than this data gives: set data.tokenizer=run:{teacher}."
        ):
            build(student(make_config, named, **{"data.tokenizer": "chars"}))
    assert load_tokenizer(teacher / "tokenizer").vocab_size == 257
    with pytest.raises(UserError, match="is not a run directory"):
        build(student(make_config, tmp_path / "nothing"))
    for key, value, message in (
        ("temperature", 0.0, "task.temperature=0.0: must be above 0."),
        ("soft_weight", 1.5, "task.soft_weight=1.5: must lie between 0 and 1."),
    ):
        with says(message):
            build(student(make_config, teacher, **{f"task.{key}": value}))
    read = rundir.read_config(teacher)
    for changes, message in (
        (
            {"max_len": 7},
            "model.max_len=7, and here data.seq_len=8: take a teacher that reads as far, or shorter rows.",
        ),
        ({"vocab_size": 256}, "model.vocab_size=256, and this data has 257 ids: a teacher needs them all."),
    ):
        (tmp_path / "small").mkdir(exist_ok=True)
        rundir.begin(tmp_path / "small", {**read, "model": {**read["model"], **changes}}, None)
        with says(f"task.teacher={str(tmp_path / 'small')!r} has {message}"):
            build(student(make_config, tmp_path / "small"))
    # Where they are traced, which is before training too.
    with pytest.raises(UserError, match=r"its logits are \(8, 8, 257\), the student's \(8, 8, 300\)"):
        build(student(make_config, teacher, **{"model.vocab_size": 300}))
    with pytest.raises(UserError, match=r"^checkpoint\.init_from: .*nothing is not a run directory"):
        build(
            student(
                make_config, teacher, **{"checkpoint.init_from": f"'{tmp_path / 'nothing'}'", "model.vocab_size": None}
            )
        )


def test_a_teacher_must_have_its_models_parameters(teacher):
    """Not one is left at zero, dropped or put in the place of another shape."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    told = load_params(teacher)[0]

    def filled(**changes):
        blank = jax.device_put(jax.tree.map(jnp.zeros_like, {**told, **changes}), whole)
        return with_donors(TrainState(0, {}, {}, {"inner": {}, "teacher": blank}, {}), {"teacher": str(teacher)})

    jax.tree.map(np.testing.assert_array_equal, filled().extra["teacher"], told)
    table = told["token_embedding"]["embedding"]
    begins = f"task.teacher={str(teacher)!r}: its parameters are not those of task.teacher_model;"
    with says(f"{begins} missing: new/kernel; of another shape: token_embedding/embedding."):
        filled(new={"kernel": jnp.ones(3)}, token_embedding={"embedding": table[1:]})
    with says(f"{begins} extra: token_embedding/embedding."):
        filled(token_embedding={})


def test_a_teachers_classes_in_another_order(tmp_path):
    """Flipped labels would be learnt without a word; a donor's are said."""
    rows = [{"text": f"the whale {i}", "label": ("negative", "positive")[i % 2]} for i in range(16)]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"name": "bert", "layers": 1, "width": 16, "heads": 2, "max_len": 16, "outputs": ("classes",)}
    data = {"name": "examples", "source": f"jsonl:{tmp_path}/*.jsonl", "tokenizer": "bytes", "seq_len": 16,
            "batch_size": 8}  # fmt: skip
    task, folder = {"name": "classification"}, tmp_path / "teacher"

    def built(task, **changes):
        section = {"model": model, "task": task, "data": {**data, **changes}, "train": {"steps": 200}}
        return build(configs.resolve(section))

    config = built(task, names=("positive", "negative")).config
    rundir.begin(folder, config, byte_tokenizer())
    wrapped = {"name": "distillation", "teacher": str(folder), "task": task}
    with says(
        f"task.teacher={str(folder)!r} has data.names=['positive', 'negative'], and here it is ['negative', 'positive']: set data.names in the"
        " teacher's order."
    ):
        built(wrapped)
    # As another library may spell them.
    config["data"]["names"] = ["POSITIVE", "NEGATIVE"]
    rundir.begin(folder, config, byte_tokenizer())
    own = built(wrapped, names=("positive", "negative"))
    assert own.config["data"]["names"] == ["positive", "negative"]
    lines = _differences(folder, built(task).config, byte_tokenizer())
    assert lines == ["data.names: ['POSITIVE', 'NEGATIVE'] there, ['negative', 'positive'] here"]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_teacher_whose_numbers_have_another_unit(tmp_path, mixed):
    """Its similarities from 0 to 1 would be learnt as such from 0 to 5."""
    for split in ("train", "valid"):
        rows = [{"text": f"the whale {i}", "label": float(i % 5)} for i in range(16)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"name": "bert", "layers": 1, "width": 16, "heads": 2, "max_len": 16, "outputs": ("classes",)}
    data = {"name": "examples", "source": f"jsonl:{tmp_path}/*.jsonl", "kind": "number"}
    common, folder = {"tokenizer": "bytes", "seq_len": 16, "batch_size": 8}, tmp_path / "teacher"

    def built(scale, **wrapper):
        task = {"name": "regression", "scale": scale}
        task, own = (
            ({"name": "mixture", "tasks": {"a": task}}, {"name": "mixture", "parts": {"a": data}})
            if mixed
            else (task, data)
        )
        task = {**wrapper, "task": task} if wrapper else task
        return build(
            configs.resolve({"model": model, "task": task, "data": {**own, **common}, "train": {"steps": 200}})
        )

    rundir.begin(folder, built(5.0).config, byte_tokenizer())
    student = {"name": "distillation", "teacher": str(folder)}
    built(5.0, **student)
    setting = "task.tasks.a.scale" if mixed else "task.scale"
    with says(
        f"task.teacher={str(folder)!r} has {setting}=5.0, and here it is 1.0: a student's numbers are in its teacher's unit."
    ):
        built(1.0, **student)


def test_a_teacher_with_fewer_segments(bert, tmp_path):  # noqa: F811
    """What it says of a pair would be NaN, and every step skipped; one that has none says numbers."""
    for split in ("train", "valid"):
        rows = [{"text": "the whale", "other": "a ship", "label": i % 2} for i in range(16)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"name": "bert", "layers": 1, "width": 16, "heads": 2, "max_len": 16, "outputs": ("classes",)}
    data = {"name": "examples", "source": f"jsonl:{tmp_path}/*.jsonl", "tokenizer": f"file:{bert}", "seq_len": 16,
            "batch_size": 8}  # fmt: skip
    own, folder = {"name": "classification"}, tmp_path / "teacher"
    wrapped = {"name": "distillation", "teacher": str(folder), "task": own}

    def built(task, types, pair):
        section = {
            "model": {**model, "types": types},
            "task": task,
            "data": {**data, "pair": pair},
            "train": {"steps": 200},
        }
        return build(configs.resolve(section))

    for types in (0, 1, 2):
        teacher = built(own, types, None)
        rundir.begin(folder, teacher.config, teacher.data.tokenizer)
        if types == 1:
            with says(
                f"task.teacher={str(folder)!r} has model.types=1, and this data has 2: a teacher needs at least 2, or 0 for none."
            ):
                built(wrapped, 2, "other")
            # Of single texts there is one segment.
            built(wrapped, 2, None)
            continue
        student = built(wrapped, 2, "other")
        params, batch = jax.jit(student.init)().params, student.data.train.batch_at(0)
        told = jax.jit(teacher.init)().params
        out = jax.jit(lambda p, told, student=student, batch=batch: student.task.loss(
            bind(student.model, {}), p, {"inner": {}, "teacher": told}, batch, None, True))(params, told)  # fmt: skip
        assert np.isfinite(out.metrics["soft_loss"][0])


def test_a_model_without_segments_reads_pairs(bert, tmp_path):  # noqa: F811
    """As DistilBERT, imported or as a student: a table of them would be no part of what it has learnt."""
    rows = [{"text": "the whale", "other": "a ship", "label": i % 2} for i in range(16)]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def built(types):
        model = {"name": "bert", "layers": 1, "width": 16, "heads": 2, "max_len": 16, "outputs": ("classes",)}
        data = {"name": "examples", "source": f"jsonl:{tmp_path}/*.jsonl", "tokenizer": f"file:{bert}", "seq_len": 16,
                "batch_size": 8, "pair": "other"}  # fmt: skip
        section = {"model": {**model, "types": types}, "task": {"name": "classification"}, "data": data}
        return build(configs.resolve({**section, "train": {"steps": 200}}))

    with says("model.types=1 is too small: the data has 2. Set at least 2, or leave it out."):
        built(1)
    student = built(0)
    with jax.set_mesh(student.layout.mesh):
        state, metrics = student.jitted_step()(student.fresh_state(), student.batch(0))
    assert np.isfinite(metrics["loss"][0]) and "type_embedding" not in state.params["embeddings"]


SIZES = [("loop", "loop", 16), ("scan", "loop", 8), ("loop", "scan", 8)]


@pytest.mark.parametrize(("ours", "theirs", "width"), SIZES)
def test_states_and_scores_are_matched_as_slow_numpy_does(ours, theirs, width):
    """Of a model called layer by layer by hand."""
    sizes = {"heads": 2, "norm_position": "post"}
    student = BertModel(BlockSpec(width=width, **sizes), vocab_size=9, max_len=6, layers=1, layer_loop=ours)
    teacher = BertModel(BlockSpec(width=16, **sizes), vocab_size=9, max_len=6, layers=2, layer_loop=theirs)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, 9, (3, 6)))
    valid = jnp.asarray(np.arange(6)[None] < np.array([[6], [4], [1]]))
    batch = {"inputs": {"tokens": tokens, "valid": valid}, "targets": tokens,
             "weights": jnp.asarray(draw.integers(0, 2, (3, 6)), jnp.float32) * valid}  # fmt: skip
    task = make(teacher="x", taught_by=teacher, model=student, build=plain, task={}, soft_weight=0.0,
                hidden=((0, 0), (1, 2)), hidden_weight=0.5, attention=((1, 1),), attention_weight=0.25)  # fmt: skip
    params = task.init_params(student.init(jax.random.key(0), tokens)["params"], jax.random.key(1))
    assert ("bridge" in params) == (width != 16)
    told = teacher.init(jax.random.key(2), tokens)["params"]
    extra = {"inner": {}, "teacher": told}
    out = jax.jit(lambda p: task.loss(bind(student, {}), p, extra, batch, None, True))(params)

    def said(model, params):
        _, found = model.apply({"params": params}, tokens, valid=valid, mutable=["intermediates"])
        found = found["intermediates"]["stack"]
        each = [found[f"block_{i}"] for i in range(model.layers)] if "block_0" in found else [
            jax.tree.map(lambda x, i=i: x[i], found["blocks"]) for i in range(model.layers)]  # fmt: skip
        return [found["inputs"], *(x["states"] for x in each)], [x["attention"]["scores"] for x in each]

    mine, others = said(student, {k: v for k, v in params.items() if k != "bridge"}), said(teacher, told)
    # A block's states are what the model returns after its last one.
    final = teacher.apply({"params": told}, tokens, valid=valid)["states"]
    np.testing.assert_allclose(others[0][-1], final, atol=1e-6)
    hard = token_prediction.make().loss(bind(student, {}), {k: v for k, v in params.items() if k != "bridge"}, {}, batch,
                                        None, True)  # fmt: skip
    want, keep = float(hard.total), np.asarray(valid)
    rows = np.asarray(batch["weights"]).sum(1)
    for a, b, name in ((0, 0, "embeddings"), (1, 2, "states")):
        x = np.asarray(mine[0][a])
        if width != 16:
            x = x @ np.asarray(params["bridge"][name]["kernel"])
        error = ((x - np.asarray(others[0][b])) ** 2).mean(-1)
        want += 0.5 * sum(rows[r] * error[r][keep[r]].mean() for r in range(3))
    error = (np.asarray(mine[1][0]) - np.asarray(others[1][0])) ** 2
    want += 0.25 * sum(rows[r] * error[r][:, keep[r]][:, :, keep[r]].mean() for r in range(3))
    assert float(out.total) == pytest.approx(want, rel=1e-5)
    assert "bridge" not in task.eval_params(params, extra)


def test_what_is_captured_costs_nothing_unasked(make_config):
    built = build(make_config())
    batch = built.data.train.batch_at(0)["inputs"]
    params = jax.jit(built.init)().params
    plainly = jax.jit(lambda p: bind(built.model, {})(p, **batch, train=False)["logits"]).lower(params).as_text()
    with_ = jax.jit(lambda p: bind(built.model, {})(p, **batch, train=False, capture=True)["logits"]).lower(params)
    assert with_.as_text().count("stablehlo.dot") == plainly.count("stablehlo.dot")


class Plain(nn.Module):
    """Of one's own."""

    @nn.compact
    def __call__(self, tokens, *, train=False):
        return {"logits": nn.Dense(9)(nn.BatchNorm(not train)(jax.nn.one_hot(tokens, 9)))}


class Counting(Plain):
    def example(self):
        return {"tokens": jnp.zeros((1, 6), jnp.int32)}


def test_bad_pairs():
    small = BertModel(BlockSpec(width=8, heads=2), vocab_size=9, max_len=6, layers=1)
    other = BertModel(BlockSpec(width=8, heads=4), vocab_size=9, max_len=6, layers=1)
    tokens = jnp.zeros((1, 6), jnp.int32)
    batch = {"inputs": {"tokens": tokens}, "targets": tokens, "weights": jnp.ones((1, 6))}

    def tried(other=other, batch=batch, **changes):
        task = make(teacher="x", taught_by=other, model=small, build=plain, task={}, **changes)
        params = small.init(jax.random.key(0), tokens)["params"]
        extra = {"inner": {}, "teacher": other.init(jax.random.key(0), **other.example())["params"]}
        return task.loss(bind(small, {}), params, extra, batch, None, True)

    with says("task.teacher='x' takes no fresh, which this data gives."):
        tried(batch=batch | {"inputs": {**batch["inputs"], "fresh": jnp.ones((1,), bool)}})
    t5 = T5Model(BlockSpec(width=8, heads=2), vocab_size=9, encoder_layers=1, decoder_layers=1)
    with says("task.teacher='x' reads decoder_tokens, which this data has not."):
        tried(other=t5)
    silent = BertModel(BlockSpec(width=8, heads=2), vocab_size=9, max_len=6, layers=1, outputs=())
    with says("task.name=distillation matches logits, and task.teacher='x' gives none that are one array for"
              " task.task.name='token_prediction'."):  # fmt: skip
        tried(other=silent)
    remembers = TransformerXl(BlockSpec(width=8, heads=2), vocab_size=9, layers=1, mem_len=4)
    with says(
        "task.teacher='x' has a memory of the segments before, and a teacher is asked about each batch alone: take one without."
    ):
        tried(other=remembers)
    with says(
        "task.teacher='x': its model Plain has no method `example()` that returns inputs, by which its parameters are known. Add one."
    ):
        make(teacher="x", taught_by=Plain(), model=small, build=plain, task={}).init_extra({})
    with says("task.teacher='x' has batch_stats besides parameters, which a teacher cannot."):
        make(teacher="x", taught_by=Counting(), model=small, build=plain, task={}).init_extra({})
    with says("task.hidden: 3 is not a pair (layer of the student, layer of the teacher)."):
        tried(hidden=(3,))
    with says("task.hidden: the teacher has no layer 2; its last is 1."):
        tried(hidden=((1, 2),))
    with says("task.attention: the student has 2 heads, the teacher 4."):
        tried(attention=((1, 1),))


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_that_share_a_block_are_told_apart(layers):
    """Unrolled as scanned, and each is what a shallower model ends with."""
    tokens = jnp.asarray(DRAW.integers(0, 9, (2, 5)))
    sizes = dict(vocab_size=9, max_len=6, embedding_width=8, outputs=())
    block = BlockSpec(width=8, heads=2, norm_position="post")
    found = {}
    for loop in ("loop", "scan"):
        model = AlbertModel(block, layers=layers, layer_loop=loop, **sizes)
        params = model.init(jax.random.key(0), tokens)["params"]
        said = bind(model, {})(params, tokens=tokens, train=False, capture=True)
        found[loop] = captured(said["captured"])
        assert [len(found[loop][name]) for name in ("states", "scores")] == [layers + 1, layers]
    for name, each in found["loop"].items():
        for ours, theirs in zip(each, found["scan"][name], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for depth in range(1, layers + 1):
        shallow = AlbertModel(block, layers=depth, **sizes).apply({"params": params}, tokens)["states"]
        np.testing.assert_allclose(found["loop"]["states"][depth], shallow, atol=1e-6)


def test_a_teacher_of_numbers():
    """One logit is no distribution: the squared difference."""
    a, b = DRAW.normal(size=(2, 5, 1))
    np.testing.assert_allclose(divergence(jnp.asarray(a), jnp.asarray(b), 2.0), ((a - b)[:, 0] / 2) ** 2, rtol=1e-5)


def test_what_has_no_logits_is_refused():
    small = BertModel(BlockSpec(width=8, heads=2), vocab_size=9, max_len=6, layers=1, outputs=("span",))
    tokens = jnp.zeros((1, 6), jnp.int32)
    batch = {"inputs": {"tokens": tokens, "valid": jnp.ones((1, 6), bool)}, "targets": jnp.zeros((1, 2), jnp.int32),
             "weights": jnp.ones(1)}  # fmt: skip
    section = {"name": "span_extraction"}
    task = make(teacher="x", taught_by=small, model=small, build=lambda _: span_extraction.make(), task=section)
    params = small.init(jax.random.key(0), tokens)["params"]
    with says("task.name=distillation matches logits, and the student gives none that are one array for"
              " task.task.name='span_extraction'."):  # fmt: skip
        task.loss(bind(small, {}), params, {"inner": {}, "teacher": params}, batch, None, True)


def test_what_asks_its_model_twice_is_refused():
    """Of the two, the generator's logits alone would be matched, and it is thrown away."""
    small = BertModel(BlockSpec(width=8, heads=2), vocab_size=9, max_len=6, layers=1)
    electra = ElectraModel(BlockSpec(width=8, heads=2), vocab_size=9, max_len=6, layers=1, generator_heads=1)
    tokens = jnp.zeros((1, 6), jnp.int32)
    batch = {"inputs": {"tokens": tokens}, "targets": tokens, "weights": jnp.ones((1, 6))}
    task = make(teacher="x", taught_by=small, model=electra, build=lambda _: replaced_token.make(),
                task={"name": "replaced_token"})  # fmt: skip
    inputs = electra.example() | {"corrupted": tokens}
    params = electra.init(jax.random.key(0), **inputs)["params"]
    told = small.init(jax.random.key(0), **small.example())["params"]
    with says(
        "task.name=distillation matches what a model says of a batch at once, and task.task.name='replaced_token' asks it twice."
    ):
        task.loss(bind(electra, {}), params, {"inner": {}, "teacher": told}, batch, None, True)


def test_a_trained_student_needs_its_teachers_folder_no_more(make_config, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    config = student(make_config, tmp_path / "teacher", **{"train.steps": 3})
    train(config, tmp_path / "run")
    want = flatten(load_params(tmp_path / "run")[0])
    # Nor does another in its place matter.
    rundir.begin(tmp_path / "teacher", make_config({"model.max_len": 4, "data.seq_len": 4}), None)
    kept = rundir.read_config(tmp_path / "run")
    build(kept, tokenizer_dir=tmp_path / "run" / "tokenizer", for_training=False)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    for path, x in flatten(load_params(tmp_path / "run")[0]).items():
        np.testing.assert_array_equal(x, want[path])
    kept = rundir.read_config(tmp_path / "run")
    assert kept["task"]["teacher_model"]["layers"] == 2 and kept["model"]["width"] == 8
    assert build(kept, tokenizer_dir=tmp_path / "run" / "tokenizer", for_training=False).model.layers == 1
