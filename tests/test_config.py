"""Configs: defaults from signatures, overrides, and the exact message for every kind of mistake."""

import copy
import json
import re
import sys

import jax
import ml_collections
import pytest

from experiments import train as train_command
from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel import mesh
from tfm_jax.sections import build_model
from tfm_jax.train.build import build
from tfm_jax.train.check import check, check_batch


def exactly(message):
    return f"^{re.escape(message)}$"


def test_defaults_are_those_of_the_signatures(make_config):
    config = make_config()
    assert tuple(config) == configs.SECTIONS
    assert config["model"]["mlp_width"] is None and config["model"]["norm_eps"] == BlockSpec().norm_eps
    assert "block" not in config["model"]
    assert config["task"] == {"name": "token_prediction", "vocab_chunk": 0, "label_smoothing": 0.0, "z_loss": 0.0}
    assert config["mesh"] == {
        "data": -1, "fsdp": 1, "tensor": 1, "expert": 1, "context": 1, "stage": 1, "microbatches": None, "across": "data", "rules": [],
        "optimizer_memory": "device",
    }  # fmt: skip
    assert config["train"] == {
        "steps": 8, "seed": 0, "accum": 1, "ema": None, "adapter": None, "quantize": [], "mup": None, "eval_every": 0,
        "stop_metric": None, "stop_patience": 3, "stop_goal": "lower", "max_bad_steps": 10,
    }  # fmt: skip
    assert config["evals"]["validation"] == {
        "name": "loss", "data": None, "split": "validation", "batch_size": None, "max_batches": None,
    }  # fmt: skip
    assert not {"params", "devices", "tokenizer_dir"} & {k.split(".")[-1] for k in configs.flat(config)}
    assert json.loads(configs.to_json(config)) == config


def test_a_resolved_config_resolves_to_itself(make_config):
    assert configs.resolve(make_config()) == make_config()


def test_the_input_is_left_as_it_was(raw_config):
    given = ml_collections.ConfigDict(copy.deepcopy(raw_config))
    resolved = configs.resolve(given, [("optim.lr", "0.5"), ("optim.options.b1", "0.8"), ("evals.new.name", "loss")])
    assert resolved["optim"]["lr"] == 0.5 and resolved["optim"]["options"] == {"b1": 0.8}
    assert given.to_dict() == raw_config


def test_a_variant_gives_defaults_that_keys_override():
    given = {"model": {"variant": "llama-mini", "width": 128}, "data": {"source": "stdlib"}, "train": {"steps": 1000}}
    model = configs.resolve(given)["model"]
    assert (model["norm"], model["width"], model["heads"], model["kv_heads"]) == ("rms", 128, 4, 2)
    built = build_model(model)
    assert built.block.width == 128 and built.block.norm == "rms" and built.layers == 4


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", "1", 1.0),
        ("optim.clip_norm", "None", None),
        ("optim.clip_norm", "none", None),
        ("model.bias", "none", "none"),
        ("model.kv_heads", "none", None),
        ("optim.freeze", "('a$', 'b')", ["a$", "b"]),
        ("optim.lr_multipliers", "[('a', 2)]", [["a", 2]]),
        ("optim.options.b2", "0.99", {"b2": 0.99}),
        ("checkpoint.asynchronous", "false", False),
        ("checkpoint.resume", "12", "12"),  # a folder whose name looks like a number
        ("model.dtype", "bfloat16", "bfloat16"),
        ("data.tokenizer", "'bytes'", "bytes"),
        ("evals.validation.max_batches", "3", 3),
        ("evals.validation.split", "train", "train"),
    ],
)
def test_overrides_are_parsed_by_the_annotation(raw_config, key, text, value):
    found = configs.resolve(raw_config, [(key, text)])
    for part in key.split("."):
        if part in ("b2",):
            break
        found = found[part]
    assert found == value and type(found) is type(value)


def test_names_and_variants_are_applied_before_the_keys_they_decide(raw_config):
    pairs = [("model.kv_heads", "1"), ("model.variant", "llama-mini"), ("model.kv_heads", "2"), ("model.heads", "4")]
    model = configs.resolve(raw_config, pairs)["model"]
    assert (model["variant"], model["kv_heads"], model["norm"]) == ("llama-mini", 2, "rms")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {}}, "config: unknown section 'modle'. Did you mean 'model'?"),
        ({"model": 3}, "config: model=3: a section is a dict of arguments."),
        ({"model": {"widht": 8}}, "config: unknown key 'model.widht' (=8). Did you mean 'width'?"),
        ({"optim": {"lrr": 8}}, "config: unknown key 'optim.lrr' (=8). Did you mean 'lr'?"),
        ({"model": {"name": "gtp"}}, "model.name='gtp' does not exist. Did you mean 'gpt'?"),
        (
            {"model": {"variant": "gpt3"}},
            "model.variant='gpt3' is not a variant of 'gpt'. Did you mean 'gpt2'?",
        ),
        ({"data": {"name": "token", "source": "x"}}, "data.name='token' does not exist. Did you mean 'tokens'?"),
        (
            {"task": {"name": "token_predicton"}},
            "task.name='token_predicton' does not exist. Did you mean 'token_prediction'?",
        ),
        ({"evals": {"v": {"name": "los"}}}, "evals.v.name='los' does not exist. Did you mean 'loss'?"),
        ({"evals": {"v": 3}}, "config: evals.v=3: an evaluator is a dict of arguments."),
        (
            {"evals": {"v": {"spilt": "x"}}},
            "config: unknown key 'evals.v.spilt' (='x'). Did you mean 'split'?",
        ),
        (
            {"evals": {"v": {"name": "scores", "metrics": ("accuracy", "mathews")}}},
            "config: evals.v.metrics=('accuracy', 'mathews') has the wrong type or value; expected a list, each one of"
            " 'accuracy', 'f1', 'macro_f1', 'matthews', 'pearson', 'spearman'. Did you mean 'matthews'?",
        ),
        (
            {"data": {"name": "examples", "source": "x", "names": "bad,good"}},
            "config: data.names='bad,good' has the wrong type; expected a list, for instance ('bad,good',).",
        ),
        (
            {"optim": {"freeze": "embed"}},
            "config: optim.freeze='embed' has the wrong type; expected a list, for instance ('embed',).",
        ),
        (
            {"model": {"remat": "ful"}},
            "config: model.remat='ful' has the wrong type or value; expected one of 'none', 'full', 'dots',"
            " 'dots_batched', or a list. Did you mean 'full'?",
        ),
        ({"train": {}}, "config: train.steps is not set, and has no default."),
        ({"data": {}}, "config: data.source is not set, and has no default."),
        (
            {"train": {"steps": "10"}},
            "config: train.steps='10' has the wrong type or value; expected int.",
        ),
        ({"train": {"steps": 1.5}}, "config: train.steps=1.5 has the wrong type or value; expected int."),
        ({"train": {"steps": True}}, "config: train.steps=True has the wrong type; expected int."),
        (
            {"model": {"norm": "rsm"}},
            "config: model.norm='rsm' has the wrong type or value; expected one of 'layer', 'rms'. Did you mean 'rms'?",
        ),
        (
            {"model": {"width": 256, "heads": 6}},
            "model.heads=6 does not divide model.width=256. Nearest that do: 4, 8; or set model.head_dim.",
        ),
        ({"model": {"layers": 0}}, "model.layers=0: must be at least 1."),
    ],
)
def test_mistakes_in_a_file(raw_config, changes, message):
    with pytest.raises(UserError, match=exactly(message)):
        configs.resolve({**raw_config, **changes})


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optm.lr", "1", "--config.optm.lr=1: unknown section 'optm'. Did you mean 'optim'?"),
        ("optim", "1", "--config.optim=1: a section cannot be set whole; name a key in it."),
        ("optim.lrr", "1", "--config.optim.lrr=1: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("evals.validation", "1", "--config.evals.validation=1: write evals.NAME.KEY."),
        (
            "evals.validation.spilt",
            "x",
            "--config.evals.validation.spilt=x: unknown key 'evals.validation.spilt'."
            " Did you mean 'evals.validation.split'?",
        ),
        ("optim.lr", "fast", "config: optim.lr='fast' has the wrong type or value; expected float."),
        (
            "optim.name",
            "adam",
            "config: optim.name='adam' has the wrong type or value; expected one of 'adamw', 'adafactor', 'lion',"
            " 'muon'. Did you mean 'adamw'?",
        ),
        ("model.name", "nets.Foo", "model.name='nets.Foo': write a dotted path as 'module.path:Model'."),
    ],
)
def test_mistakes_on_the_command_line(raw_config, key, text, message):
    with pytest.raises(UserError, match=exactly(message)):
        configs.resolve(raw_config, [(key, text)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.steps": 0}, "train.steps=0: must be at least 1."),
        ({"train.accum": 0}, "train.accum=0: must be at least 1."),
        ({"train.max_bad_steps": 0}, "train.max_bad_steps=0: must be at least 1."),
        ({"train.ema": 1.0}, "train.ema=1.0: a decay in (0, 1), for instance 0.999; None for no average."),
        ({"checkpoint.keep": 0}, "checkpoint.keep=0: must be at least 1."),
        ({"checkpoint.every": -1}, "checkpoint.every=-1: must be at least 0."),
        (
            {"checkpoint.resume": "a", "checkpoint.init_from": "b"},
            "checkpoint.resume and checkpoint.init_from exclude each other: give one.",
        ),
        ({"checkpoint.layers": (0, 2)}, "checkpoint.layers=[0, 2]: says how to read checkpoint.init_from, which is not set."),
        (
            {"checkpoint.resume": "a", "checkpoint.resize_positions": True},
            "checkpoint.resize_positions=True: says how to read checkpoint.init_from, which is not set.",
        ),
        ({"optim.warmup_steps": 8}, "optim.warmup_steps=8: must be at least 0 and below train.steps=8."
         " Usual: optim.warmup_steps=0."),
        ({"data.seq_len": 17}, "data.seq_len=17 is longer than model.max_len=16."),
        (
            {"evals.validation.data": {"seq_len": 17}},
            "evals.validation.data.seq_len=17 is longer than model.max_len=16.",
        ),
        (
            {"model.attention": "cudnn"},
            "model.attention='cudnn' is not available on cpu. Available here: auto, xla, chunked.",
        ),
        (
            {"optim.options.nestrov": True},
            "optim.options.nestrov is not an option of 'adamw'. Did you mean 'nesterov'?",
        ),
        ({"train.accum": 3}, "train.accum=3 does not divide data.batch_size=8."),
        ({"data.batch_size": 0}, "data.batch_size=0: must be at least 1."),
        (
            {"data.batch_size": 12},
            "data.batch_size=12 does not divide over the mesh: data=8 x fsdp=1 x expert=1 x stage=1 = 8 ways. Nearest that do: 8, 16.",
        ),
        (
            {"train.accum": 2},
            "data.batch_size=8 / train.accum=2 = 4 rows does not divide over the mesh: data=8 x fsdp=1 x expert=1 x stage=1 = 8 ways."
            " Nearest that do: 16.",
        ),
        ({"model.vocab_size": 9}, "model.vocab_size=9 is too small: the data has 257. Set at least 257, or leave it"
         " out."),
        ({"task.vocab_chunk": -1}, "task.vocab_chunk=-1: 0 for no chunks, or the entries in one."),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together(make_config, changes, message):
    with pytest.raises(UserError, match=exactly(message)):
        build(make_config(changes))


@pytest.mark.parametrize("changes", [{"data.seq_len": 17}, {"train.accum": 2}, {"model.attention": "cudnn"}])
def test_they_are_found_before_the_data_is_opened(make_config, changes):
    config = make_config({**changes, "data.source": "text:/nowhere/*.txt"})
    layout = mesh.make(**config["mesh"])
    with pytest.raises(UserError):
        check(config, layout)
        check_batch(config, layout)
    with pytest.raises(UserError) as found:
        build(config)
    assert "nowhere" not in str(found.value)


def test_wandb_that_is_not_installed(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = "log.wandb='me/project' needs Weights & Biases: pip install 'tfm_jax[wandb]'."
    with pytest.raises(UserError, match=exactly(message)):
        build(make_config({"log.wandb": "me/project"}))


def test_a_split_that_the_data_does_not_have(make_config, corpus):
    experiment = build(make_config({"evals.validation.split": "valdation"}))
    message = f"data.source='text:{corpus}/*.txt' has no split 'valdation'. Did you mean 'validation'?"
    with pytest.raises(UserError, match=exactly(message)):
        experiment.evaluators()


def test_the_vocabulary_is_filled_in_from_the_data(make_config):
    config = make_config()
    built = build(config)
    assert config["model"]["vocab_size"] is None
    assert built.config["model"]["vocab_size"] == 257 == built.model.vocab_size
    # Token and position tables, one block (4D^2 attention, 8D^2 MLP, biases 4D + 5D, two norms 4D), the last norm.
    width = 16
    assert built.parameter_count == (257 + 16) * width + 12 * width**2 + 13 * width + 2 * width
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(built.abstract_state()))


def test_what_may_change_between_two_starts_of_a_run(make_config):
    base = make_config()
    for key, value in [
        ("mesh.fsdp", 2), ("checkpoint.every", 1), ("log.every", 7), ("evals.more.name", "loss"),
        ("data.cache_dir", "/x"), ("data.workers", 3), ("train.eval_every", 5),
    ]:  # fmt: skip
        other = make_config({key: value})
        assert other != base and configs.digest(other) == configs.digest(base) and not configs.differences(base, other)
    for key, value in [("train.steps", 9), ("data.seed", 1), ("task.z_loss", 0.1)]:
        assert configs.digest(make_config({key: value})) != configs.digest(base), key


def test_what_decides_when_a_run_ends_may_not_change(make_config):
    watching = {"train.stop_metric": "eval/validation/loss", "train.eval_every": 5, "evals.more.name": "loss"}
    base = make_config(watching)
    free = make_config({**watching, "evals.more.split": "train"})
    assert configs.digest(free) == configs.digest(base) and not configs.differences(base, free)
    for key, value, line in [
        ("train.eval_every", 1, "train.eval_every: 5 -> 1"),
        ("evals.validation.max_batches", 2, "evals.validation.max_batches: None -> 2"),
    ]:
        other = make_config({**watching, key: value})
        assert configs.digest(other) != configs.digest(base) and configs.differences(base, other) == [line]


def test_differences_name_the_keys(make_config):
    other = make_config({"optim.lr": 0.5, "optim.options.b1": 0.8, "mesh.fsdp": 2})
    assert configs.differences(make_config(), other) == [
        "optim.lr: 0.01 -> 0.5",
        "optim.options: None -> '(not set)'",
        "optim.options.b1: '(not set)' -> 0.8",
    ]


def test_a_config_is_what_its_file_says(make_config):
    """Otherwise a run with tuples in its config would not be its own when it goes on."""
    config = make_config({"optim.lr_multipliers": "(('a', 2),)", "mesh.rules": "(('a', ('data', None)),)"})
    assert configs.differences(json.loads(configs.to_json(config)), config) == []
    assert json.loads(configs.to_json(config)) == config


def test_a_free_key_does_not_free_its_namesakes():
    old, new = {"data": {"workers": 1, "workers_more": 1}}, {"data": {"workers": 2, "workers_more": 2}}
    assert configs.differences(old, new) == ["data.workers_more: 1 -> 2"]


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("", "{}/tiny.py", "--config={0}/tiny.py: {0}/tiny.py has no get_config(arguments)."),
        ("", "{}/tiyn.py", "--config={0}/tiyn.py: there is no file {0}/tiyn.py. Did you mean '{0}/tiny.py'?"),
        (
            "def get_config(): return {}",
            "{}/tiny.py:x",
            "--config={0}/tiny.py:x: get_config in {0}/tiny.py takes no arguments, but 'x' was given.",
        ),
    ],
)
def test_config_files(tmp_path, text, spec, message):
    (tmp_path / "tiny.py").write_text(text)
    with pytest.raises(UserError, match=exactly(message.format(tmp_path))):
        configs.load(spec.format(tmp_path))


def test_a_config_file_gets_its_argument(tmp_path):
    (tmp_path / "a.py").write_text("def get_config(argument='none'): return {'got': argument}")
    assert configs.load(f"{tmp_path}/a.py:some:thing") == {"got": "some:thing"}
    assert configs.load(f"{tmp_path}/a.py") == {"got": ""}


def test_print_config_shows_what_would_run(config_file, raw_config, capsys):
    assert train_command.main([f"--config={config_file}", "--config.optim.lr=3e-4", "--print_config"]) == 0
    assert json.loads(capsys.readouterr().out) == configs.resolve(raw_config, [("optim.lr", "3e-4")])


def test_a_new_evaluator_on_the_command_line_starts_with_its_name(make_config):
    with pytest.raises(UserError) as wrong:
        make_config({"evals.validaton.max_batches": 2})
    assert str(wrong.value) == (
        "--config.evals.validaton.max_batches=2: there is no evaluator 'validaton'. Did you mean 'validation'?"
        " A new one starts with --config.evals.validaton.name=loss."
    )


@pytest.mark.parametrize(
    ("name", "objective", "fitting"), [("gpt", "mask", "next, prefix_lm"), ("bert", "next", "mask, follow, order")]
)
def test_an_objective_that_makes_no_sense_of_a_model(make_config, name, objective, fitting):
    config = make_config({"data.objective": f"'{objective}'"})
    model = {"name": name, "layers": 1, "width": 16, "heads": 2, "max_len": 16}
    config = configs.resolve({**config, "model": model})
    with pytest.raises(UserError, match=exactly(
        f"data.objective={objective!r} does not fit model.name={name!r}; what does: {fitting}."
    )):  # fmt: skip
        build(config)


def test_a_run_older_than_a_field_has_its_default():
    section = configs.resolve(
        {
            "model": {"name": "bert", "vocab_size": 9, "classes": 2},
            "data": {"source": "stdlib"},
            "train": {"steps": 200},
        }
    )["model"]
    older = {key: value for key, value in section.items() if key not in ("experts", "norm_eps", "classes")}
    got, want = build_model(older), build_model(section)
    # The family's own, and not the block's.
    assert got.block == want.block and got.block.norm_eps == 1e-12
    assert (got.classes, want.classes) == (None, 2)
