"""What an import refuses, and how files may look. The numbers are checked by tests/parity."""

import json
import re
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from experiments import convert, evaluate, generate
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.convert import huggingface, images, tensors
from tfm_jax.convert.table import Conversion, each_layer, embedding, linear, norm
from tfm_jax.convert.tokenizer import read_tokenizer, write_files
from tfm_jax.data import objectives
from tfm_jax.data.tokenizers import load_tokenizer
from tfm_jax.data.vocabularies import byte_tokenizer, train_tokenizer
from tfm_jax.errors import UserError
from tfm_jax.paths import flatten
from tfm_jax.train.restore import load_params

VOCAB, WIDTH, LAYERS = 257, 16, 2
CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH,
    "n_layer": LAYERS, "n_head": 2, "eos_token_id": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def weights(dtype=np.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(0, 0.1, shape).astype(dtype)

    out = {"transformer.wte.weight": draw(VOCAB, WIDTH), "transformer.wpe.weight": draw(32, WIDTH)}
    for i in range(LAYERS):
        h = f"transformer.h.{i}"
        for name, fan_in, fan_out in (
            ("attn.c_attn", WIDTH, 3 * WIDTH), ("attn.c_proj", WIDTH, WIDTH), ("mlp.c_fc", WIDTH, 4 * WIDTH),
            ("mlp.c_proj", 4 * WIDTH, WIDTH),
        ):  # fmt: skip
            out |= {f"{h}.{name}.weight": draw(fan_in, fan_out), f"{h}.{name}.bias": draw(fan_out)}
        for name in ("ln_1", "ln_2"):
            out |= {f"{h}.{name}.weight": draw(WIDTH), f"{h}.{name}.bias": draw(WIDTH)}
    return out | {"transformer.ln_f.weight": draw(WIDTH), "transformer.ln_f.bias": draw(WIDTH)}


@pytest.fixture
def folder(tmp_path):
    """`folder(config={...}, weights={...}, tokenizer=True)`: a model folder."""

    def make(name="theirs", config=(), arrays=None, tokenizer=True):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**CONFIG, **dict(config)}))
        safetensors.numpy.save_file(weights() if arrays is None else arrays, path / "model.safetensors")
        if tokenizer:
            byte_tokenizer().save(path)
        return path

    return make


def test_a_run_made_from_a_folder_is_one_like_any_other(folder, tmp_path, capsys, corpus):
    run = tmp_path / "run"
    assert convert.main([f"--from=hf:{folder()}", f"--to={run}", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        record["parameters"] == sum(x.size for x in weights().values())
        and record["architecture"] == CONFIG["architectures"][0]
    )
    assert generate.main([f"--run={run}", "--prompt=The ", "--max_new=4", "--temperature=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] <= 4
    data = [f"--config.data.source=text:{corpus}/*.txt", "--config.data.batch_size=8", "--config.data.seq_len=8"]
    assert evaluate.main([f"--run={run}", *data, "--json"]) == 0
    # Random weights know nothing: about ln 257.
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval/validation/loss"] == pytest.approx(
        np.log(257), abs=0.3
    )
    assert convert.main([f"--from={run}", f"--to=hf:{tmp_path}/again"]) == 0
    with safetensors.safe_open(tmp_path / "again" / "model.safetensors", framework="numpy") as again:
        assert again.metadata() == {"format": "pt"}
        assert {name: again.get_tensor(name).tobytes() for name in again.keys()} == {  # noqa: SIM118 - not a dict
            name: x.tobytes() for name, x in weights().items()
        }
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config | CONFIG == config and config["dtype"] == "float32"
    assert (tmp_path / "again" / "tokenizer.json").read_text() == byte_tokenizer().json


def test_files_in_shards(folder, tmp_path, monkeypatch):
    path = folder()
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 8000)
    arrays = weights()
    (path / "model.safetensors").unlink()
    tensors.write_tensors(
        path, {k: x.shape for k, x in arrays.items()}, arrays.__getitem__, {k: x.dtype for k, x in arrays.items()}
    )
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert len(shards) > 2 and all(p.stat().st_size < 20000 for p in path.glob("*.safetensors"))
    convert.bring_in(path, tmp_path / "run")
    params, _ = load_params(tmp_path / "run")
    np.testing.assert_array_equal(params["token_embedding"]["embedding"], arrays["transformer.wte.weight"])
    (path / shards[1]).unlink()
    index = path / "model.safetensors.index.json"
    with says(f"{index} names files that are not there: {shards[1]}."):
        tensors.open_tensors(path)
    for content in ("{", "[]", "{}"):
        index.write_text(content)
        with pytest.raises(UserError, match="is not an index of tensor files"):
            tensors.open_tensors(path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_comes_back_in_its_own_bytes(folder, tmp_path, dtype):
    arrays = weights(dtype)
    name = np.dtype(dtype).name
    convert.bring_in(folder(config={"torch_dtype": name}, arrays=arrays), tmp_path / "run")
    params, _ = load_params(tmp_path / "run")
    assert {x.dtype for x in flatten(params).values()} == {np.dtype("float32")}
    convert.give_back(tmp_path / "run", tmp_path / "again")
    again = tensors.open_tensors(tmp_path / "again")
    assert {k: again[k].tobytes() for k in again} == {k: x.tobytes() for k, x in arrays.items()}


def test_every_mistake_in_the_tensors_is_listed(folder, tmp_path):
    arrays = weights()
    del arrays["transformer.h.1.ln_2.bias"]
    arrays["transformer.wpe.weight"] = arrays["transformer.wpe.weight"][:9]
    arrays["transformer.h.2.ln_1.bias"] = np.zeros(16, np.float32)
    arrays["lm_head.weight"] = np.zeros((VOCAB, WIDTH), np.float32)
    arrays["transformer.h.0.attn.bias"] = np.zeros((1, 1, 4, 4), np.float32)  # a mask that old files carry
    path = folder(arrays=arrays)
    with says(
        f"{path} does not fit its config (GPT2LMHeadModel):\n"
        "  transformer.h.1.ln_2.bias: missing\n"
        "  lm_head.weight: differs from transformer.wte.weight, to which the config ties it\n"
        "  transformer.h.2.ln_1.bias: (16,) has no place in the model\n"
        "  transformer.wpe.weight: (9, 16), but the config makes it (32, 16)"
    ):
        convert.bring_in(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_mistake_in_the_config_is_listed(folder, tmp_path):
    path = folder(config={"scale_attn_by_inverse_layer_idx": True, "activation_function": "mish", "n_experts": 4})
    with says(
        f"{path}/config.json (GPT2LMHeadModel) asks for what is not here:\n"
        "  scale_attn_by_inverse_layer_idx=True is not supported; what is: False\n"
        "  activation_function='mish' is not supported; what is: 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'gelu_fast',"
        " 'silu', 'swish', 'relu'\n"
        "  n_experts=4 is not known\n"
        "If an unknown field changes nothing: --ignore n_experts"
    ):
        convert.bring_in(path, tmp_path / "run")
    harmless = folder("harmless", config={"n_experts": 4})
    assert convert.main([f"--from=hf:{harmless}", f"--to={tmp_path}/run", "--ignore=n_experts"]) == 0


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"^The architecture GPT2LMHeadModle is not known\. Did you mean 'GPT2LMHeadModel'\?"
    ):
        huggingface.find({"architectures": ["GPT2LMHeadModle"]})
    with says(f"There is no folder {tmp_path}/empty; nothing is downloaded."):
        convert.bring_in(tmp_path / "empty", tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    with says(f"There is no {empty}/config.json."):
        convert.bring_in(empty, tmp_path / "run")
    (empty / "config.json").write_text(json.dumps(CONFIG))
    names = "model.safetensors, model.safetensors.index.json, pytorch_model.bin and pytorch_model.bin.index.json"
    with says(f"{empty} has no weights: none of {names} is there."):
        convert.bring_in(empty, tmp_path / "run")
    (empty / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(UserError, match="is not a safetensors file"):
        convert.bring_in(empty, tmp_path / "run")
    for flags, message in (
        (["--from=a", "--to=b"], "--from=a --to=b: one of them must be hf:FOLDER, the other a run."),
        (["--from=hf:a", "--to=b", "--table=x"], "--table=x: write package.module:NAME."),
    ):
        with says(message):
            convert.main(flags)


def test_a_pickle_is_not_read_without_the_safe_loader(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"is a pickle, which runs code when it is read\."):
        tensors.open_tensors(tmp_path)


def test_what_cannot_be_given_back_says_why(tmp_path, make_config):
    from tfm_jax.train.run import train

    run = tmp_path / "run"
    train(make_config({"model.norm": "rms", "model.bias": "'none'", "train.steps": 1, "optim.warmup_steps": 0}), run)
    with pytest.raises(UserError) as found:
        convert.give_back(run, tmp_path / "out")
    lines = str(found.value).splitlines()
    assert lines[0].startswith("No class in transformers computes what this model computes. The nearest, ")
    assert any("model.norm='rms'" in line or "model.position='learned'" in line for line in lines[1:])
    assert not (tmp_path / "out").exists()


def test_sizes_that_a_class_cannot_have_are_not_lost():
    """BERT has no field for the size of a head."""
    given = {"name": "bert", "variant": "mini", "vocab_size": 64, "head_dim": 32}
    section = configs.resolve({"model": given, "data": {"source": "stdlib"}, "train": {"steps": 1}})["model"]
    with pytest.raises(UserError, match=re.escape("model.head_dim=32 (it has 64)")):
        huggingface.for_export(section)
    assert huggingface.best({**section, "head_dim": 64}).architecture == "BertForMaskedLM"


def own_table(section):
    names = ("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")
    layer = [row for a, b in names for row in linear(f"l{{i}}.{a}", f"stack/block_{{i}}/attention/{b}")]
    for name in ("up", "down"):
        layer += linear(f"l{{i}}.{name}", f"stack/block_{{i}}/mlp/{name}")
    for name in ("attention_norm", "mlp_norm"):
        layer += norm(f"l{{i}}.{name}", f"stack/block_{{i}}/{name}")
    rows = embedding("words", "token_embedding") + embedding("places", "position_embedding")
    return rows + each_layer(layer, section["layers"]) + norm("last", "stack/final_norm")


OWN = Conversion(
    "MyLabsGPT",
    "mylab",
    "gpt",
    lambda c: {"vocab_size": c.take("v"), "width": c.take("d"), "layers": c.take("n"), "heads": 2, "max_len": 8},
    lambda m: {"v": m["vocab_size"], "d": m["width"], "n": m["layers"]},
    own_table,
)


def test_a_table_of_the_users_own(tmp_path):
    """Named by a dotted path, it serves an architecture that this package has never heard of."""
    path, rng = tmp_path / "theirs", np.random.default_rng(1)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["MyLabsGPT"], "v": 11, "d": 4, "n": 1}))
    sizes = {"words.weight": (11, 4), "places.weight": (8, 4), "l0.up.weight": (16, 4), "l0.up.bias": (16,)}
    sizes |= {"l0.down.weight": (4, 16), "l0.down.bias": (4,), "last.weight": (4,), "last.bias": (4,)}
    sizes |= {f"l0.{n}.weight": (4, 4) for n in "qkvo"} | {f"l0.{n}.bias": (4,) for n in "qkvo"}
    sizes |= {f"l0.{n}.{k}": (4,) for n in ("attention_norm", "mlp_norm") for k in ("weight", "bias")}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    table = f"--table={__name__}:OWN"
    assert convert.main([f"--from=hf:{path}", f"--to={tmp_path}/run", table]) == 0
    params, _ = load_params(tmp_path / "run")
    np.testing.assert_array_equal(params["stack"]["block_0"]["mlp"]["up"]["kernel"], arrays["l0.up.weight"].T)
    assert convert.main([f"--from={tmp_path}/run", f"--to=hf:{tmp_path}/again", table]) == 0
    again = tensors.open_tensors(tmp_path / "again")
    assert {k: again[k].tobytes() for k in again} == {k: x.tobytes() for k, x in arrays.items()}


def test_files_saved_from_the_trunk_alone(folder, tmp_path):
    """As GPT-2 was published: the class with a head, the names without its prefix."""
    bare = {name.removeprefix("transformer."): x for name, x in weights().items()}
    convert.bring_in(folder(arrays=bare), tmp_path / "run")
    params, _ = load_params(tmp_path / "run")
    np.testing.assert_array_equal(params["stack"]["final_norm"]["bias"], bare["ln_f.bias"])
    with pytest.raises(UserError, match=re.escape("wte.weight: (257, 16) has no place in the model")):
        convert.bring_in(folder("both", arrays={**weights(), "wte.weight": bare["wte.weight"]}), tmp_path / "other")


def test_heads_of_pretraining_that_the_class_has_not():
    """BERT's published file names BertForMaskedLM, and holds the pooler and the pair head."""
    known = {c.architecture: c for c in huggingface.conversions()}
    extra = ("bert.pooler.dense.weight", "cls.seq_relationship.bias")
    for name, skipped in (("BertForMaskedLM", extra), ("BertForPreTraining", ()), ("RobertaForMaskedLM", ())):
        found = [x for x in extra if any(re.search(pattern, x) for pattern in known[name].skip)]
        assert tuple(found) == skipped, name


@pytest.mark.parametrize("architecture", ["RobertaForMaskedLM", "LongformerForMaskedLM"])
def test_a_head_that_has_one_activation_only(architecture):
    conversion = huggingface.find({"architectures": [architecture]})
    with pytest.raises(UserError, match=re.escape("hidden_act='relu' is not supported; what is: 'gelu'")):
        huggingface.read_section(conversion, {"hidden_act": "relu"}, where="config.json")


def test_mixed_types_go_back_as_they_came(folder, tmp_path):
    arrays = {name: x.astype(np.float16 if ".h.0." in name else np.float32) for name, x in weights().items()}
    convert.bring_in(folder(config={"dtype": "bfloat16"}, arrays=arrays), tmp_path / "run")
    convert.give_back(tmp_path / "run", tmp_path / "again")
    again = tensors.open_tensors(tmp_path / "again")
    assert {k: (again[k].dtype, again[k].tobytes()) for k in again} == {
        k: (x.dtype, x.tobytes()) for k, x in arrays.items()
    }


def test_a_model_without_a_tokenizer_asks_for_one(folder, tmp_path, corpus):
    run = tmp_path / "run"
    convert.bring_in(folder(tokenizer=False), run)
    data = [f"--config.data.source=text:{corpus}/*.txt", "--config.data.batch_size=8", "--config.data.seq_len=8"]
    with says(
        "This model came without a tokenizer that can be read. Give one: --config.data.tokenizer=file:PATH, or"
        " sentencepiece:PATH."
    ):
        evaluate.main([f"--run={run}", *data])
    assert evaluate.main([f"--run={run}", *data, "--config.data.tokenizer=bytes"]) == 0


def test_flags_that_have_no_meaning_here():
    with says("--dtype has no meaning from hf:a to b."):
        convert.main(["--from=hf:a", "--to=b", "--dtype=float16"])
    with says("--step has no meaning from hf:a to b."):
        convert.main(["--from=hf:a", "--to=b", "--step=1"])
    with says("--ignore has no meaning from a to hf:b."):
        convert.main(["--from=a", "--to=hf:b", "--ignore=x"])


def test_a_run_takes_its_name_when_it_is_whole(folder, tmp_path, monkeypatch):
    path = folder()
    with monkeypatch.context() as patch:
        patch.setattr("tfm_jax.files.write_status", lambda *_, **__: (_ for _ in ()).throw(OSError("the plug")))
        with pytest.raises(OSError, match="the plug"):
            convert.bring_in(path, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]
    convert.bring_in(path, tmp_path / "run")


def test_vocabularies_of_older_folders(tmp_path):
    """vocab.txt alone, and vocab.json with merges.txt, give the ids that their own classes would."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "whale", "##s", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    found = read_tokenizer(tmp_path)
    assert [words[i] for i in found.encode_batch(["The whales!"])[0]] == ["the", "whale", "##s", "!"]
    assert (found.token_id("[MASK]"), found.end_id) == (4, 3)
    (tmp_path / "vocab.txt").unlink()
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "</s>": 3, "<mask>": 4}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    found = read_tokenizer(tmp_path)
    assert found.encode_batch(["abba"])[0].tolist() == [2, 1, 0] and (found.end_id, found.token_id("<mask>")) == (3, 4)


def test_a_file_that_is_more_than_tensors(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="holds more than tensors, or is damaged; it was not read"):
        tensors.open_tensors(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_older_names_keep_their_types(folder, tmp_path, dtype):
    """GPT-2 as published has no prefix, and BERT's norms are gamma and beta: their types are those of the file."""
    arrays = {name.removeprefix("transformer."): x for name, x in weights(dtype).items()}
    arrays = {re.sub(r"(ln_1)\.weight$", r"\1.gamma", name): x for name, x in arrays.items()}
    convert.bring_in(folder(config={"dtype": "float32"}, arrays=arrays), tmp_path / "run")
    convert.give_back(tmp_path / "run", tmp_path / "again")
    again = tensors.open_tensors(tmp_path / "again")
    assert {k: again[k].tobytes() for k in again} == {k: x.tobytes() for k, x in weights(dtype).items()}


def test_one_tensor_by_two_names(folder, tmp_path):
    arrays = weights()
    arrays["transformer.h.0.ln_1.gamma"] = arrays["transformer.h.0.ln_1.weight"] + 1
    path = folder(arrays=arrays)
    name = "transformer.h.0.ln_1"
    with says(
        f"{path} does not fit its config (GPT2LMHeadModel):\n  {name}.weight: is there as {name}.gamma and {name}.weight"
    ):
        convert.bring_in(path, tmp_path / "run")


def test_fields_of_no_type_that_a_model_has(folder, tmp_path):
    """Every one is listed; what cannot even be divided is one more line."""
    path = folder(config={"n_embd": "16", "n_layer": None, "activation_function": ["gelu"], "embd_pdrop": True})
    with says(
        f"{path}/config.json (GPT2LMHeadModel) asks for what is not here:\n"
        "  embd_pdrop=True is not a number\n"
        "  n_embd='16' is not a whole number\n"
        "  n_layer=None is not a whole number\n"
        "  activation_function=['gelu'] is not a text"
    ):
        convert.bring_in(path, tmp_path / "run")
    llama = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 0}
    with pytest.raises(UserError, match=re.escape("its fields do not fit together (ZeroDivisionError: ")):
        huggingface.read_section(huggingface.find(llama), llama, where="it")
    for content, message in (
        ("[1]", "config.json is a JSON list, not an object."),
        ('{"architectures": 5}', "config.json: architectures=5 is not a list of names."),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=re.escape(message)):
            convert.bring_in(tmp_path, tmp_path / "run")
    with says("--ignore n_expert: config.json has no such field. Did you mean 'n_experts'?"):
        huggingface.read_section(
            huggingface.find(CONFIG), {**CONFIG, "n_experts": 4}, where="config.json", ignore=["n_expert"]
        )


def test_dropout_that_changes_no_number_can_be_ignored(folder, tmp_path):
    path = folder(config={"embd_pdrop": 0.3})
    with pytest.raises(UserError, match=r"embd_pdrop=0\.3 is not supported"):
        convert.bring_in(path, tmp_path / "run")
    convert.bring_in(path, tmp_path / "run", ignore=["embd_pdrop"])


def test_what_rope_and_t5_are_told_twice():
    """The older field counts in `transformers`, and what it computes from others can be written out."""

    def read(config):
        return huggingface.read_section(huggingface.find(config), config, where="it")

    llama = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    found = read({**llama, **both})
    assert (found["rope_scaling"], found["rope_factor"], found["rope_theta"]) == ("linear", 4.0, 10_000.0)
    short = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert read({**llama, "rope_scaling": short})["rope_original_len"] == 64
    t5 = {"architectures": ["T5ForConditionalGeneration"], "feed_forward_proj": "gated-gelu"}
    assert read({**t5, "dense_act_fn": "gelu_new", "is_gated_act": True})["activation"] == "gelu_tanh"
    for changed in ({"dense_act_fn": "gelu"}, {"is_gated_act": False}):
        with pytest.raises(UserError, match=f"{next(iter(changed))}=.* is not supported"):
            read({**t5, **changed})


def test_a_head_size_of_its_own_goes_back():
    """No candidate but the right one can have it, and some could not even be built."""
    qwen = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 36, "num_attention_heads": 5, "num_key_value_heads": 1,
            "head_dim": 8, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 11}  # fmt: skip
    section = huggingface.read_section(huggingface.find(qwen), qwen, where="it")
    section = configs.resolve({"model": section, "data": {"source": "stdlib"}, "train": {"steps": 1}})["model"]
    assert huggingface.best(section).architecture == "Qwen3ForCausalLM"


def test_places_that_cannot_be(folder, tmp_path):
    path, file = folder(), tmp_path / "file"
    file.write_text("")
    for target in (file, file / "below"):
        with says(f"{file} is a file: give a new run directory."):
            convert.bring_in(path, target)
    with says(f"{path} is not a run directory: its config.json has no section 'model'. A model folder is hf:{path}."):
        convert.give_back(path, tmp_path / "out")
    with says("--config=x.py: the config is the run's or the model's own; change it with --config.KEY=VALUE."):
        convert.main(["--from=hf:a", "--to=b", "--config=x.py"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("vocab.txt", ""), ("tokenizer_config.json", "[]"), ("tokenizer.json", "{}"), ("merges.txt", "x y z w\n")],
)
def test_tokenizer_files_that_are_none(tmp_path, name, content):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"tokenizer|{re.escape(str(tmp_path))}"):
        read_tokenizer(tmp_path)


def test_marks_around_a_text_by_roberta_style_files(tmp_path):
    (tmp_path / "vocab.json").write_text(
        json.dumps({"a": 0, "b": 1, "\u0120a": 2, "\u0120": 6, "<s>": 3, "</s>": 4, "<pad>": 5})
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\u0120 a\n")
    assert read_tokenizer(tmp_path).prompt("ab") == [3, 0, 1, 4]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    assert read_tokenizer(tmp_path).prompt("ab") == [3, 2, 1, 4]


def test_a_table_of_the_users_own_is_remembered_and_comes_first(folder, tmp_path):
    """An import by one's own table goes back by it, and a table given is never passed over for a built-in one."""
    import dataclasses

    built_in = huggingface.find(CONFIG)
    module = sys.modules[__name__]
    module.RENAMED = dataclasses.replace(built_in, architecture="MyGPT")
    convert.bring_in(folder(config={"architectures": ["MyGPT"]}), tmp_path / "run", table=f"{__name__}:RENAMED")
    assert convert.give_back(tmp_path / "run", tmp_path / "a")["architecture"] == "MyGPT"
    convert.bring_in(folder("plain"), tmp_path / "plain_run")
    assert (
        convert.give_back(tmp_path / "plain_run", tmp_path / "b", table=f"{__name__}:RENAMED")["architecture"]
        == "MyGPT"
    )
    module.RENAMED = dataclasses.replace(built_in, family="bert")
    with says("--table is for model.name='bert', but this model is a 'gpt'."):
        convert.give_back(tmp_path / "plain_run", tmp_path / "c", table=f"{__name__}:RENAMED")


def test_pickles_in_shards(folder, tmp_path):
    torch = pytest.importorskip("torch")
    path, arrays = folder(), weights()
    (path / "model.safetensors").unlink()
    names = sorted(arrays)
    index = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: torch.from_numpy(arrays[name]) for name in part}, path / file)
        index |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    found = tensors.open_tensors(path)
    assert {k: found[k].tobytes() for k in found} == {k: x.tobytes() for k, x in arrays.items()}


def test_t5s_sentinels_are_behind_its_pieces(tmp_path):
    """Its `spiece.model` has 32,000 pieces, and its class adds <extra_id_99> to <extra_id_0> behind them."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("the whale swims in the sea and the ship sails on the sea\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=18, minloglevel=2
    )
    assert read_tokenizer(tmp_path).vocab_size == 18
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 3}))
    found = read_tokenizer(tmp_path)
    assert [found.token_id(f"<extra_id_{i}>") for i in range(4)] == [20, 19, 18, None]
    # As with other marks, text that spells one is text.
    assert not {18, 19, 20} & {*found.encode_batch(["the <extra_id_0> sails"])[0].tolist()}
    assert found.decode([*found.encode_batch(["the whale"])[0], 20]) == "the whale"
    found.save(tmp_path / "run" / "tokenizer")
    assert load_tokenizer(tmp_path / "run" / "tokenizer").vocab_size == 21
    # A run that was tuned with it is given back as T5's class has it: without them, and their number.
    (tmp_path / "out").mkdir()
    write_files(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["spiece.model", "tokenizer_config.json"]
    again = read_tokenizer(tmp_path / "out")
    assert [again.token_id(f"<extra_id_{i}>") for i in range(3)] == [20, 19, 18] and again.vocab_size == 21
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert read_tokenizer(tmp_path).token_id("<extra_id_0>") == 117


VISION = dict(size={"height": 256, "width": 256}, crop_size={"height": 224, "width": 224}, do_center_crop=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        # google/vit-base-patch16-224, facebook/deit-base-distilled-patch16-224, and one from before sizes were named.
        (
            dict(do_normalize=True, do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2, size=224),
            dict(image_size=224, scaled_to=224, fit="squeeze", resample="bilinear", mean=[0.5] * 3, std=[0.5] * 3),
        ),
        (
            dict(**VISION, image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3], resample=3, rescale_factor=1 / 255),
            dict(image_size=224, scaled_to=256, fit="squeeze", resample="bicubic", mean=[0.4, 0.5, 0.6]),
        ),
        (
            dict(image_processor_type="DeiTImageProcessor"),
            dict(image_size=224, scaled_to=256, fit="squeeze", resample="bicubic"),
        ),
        (
            dict(size={"shortest_edge": 256}, crop_size=224, do_center_crop=True, do_normalize=False),
            dict(image_size=224, scaled_to=256, fit="cover", mean=(0.0,), std=(1.0,)),
        ),
    ],
)
def test_how_images_are_prepared(tmp_path, theirs, ours):
    assert images.read_settings(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(theirs))
    found = images.read_settings(tmp_path)
    assert {**found, **ours} == found


def test_images_prepared_in_an_unknown_way(tmp_path):
    theirs = dict(size={"height": 256, "width": 128}, resample=1, do_rescale=False)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(theirs))
    with says(
        f"{tmp_path}/preprocessor_config.json prepares images as `data.images` cannot:\n"
        "  size={'height': 256, 'width': 128}, crop_size=224: squares only\n"
        "  do_rescale=False: only True\n"
        "  resample=1: only 2, 3"
    ):
        images.read_settings(tmp_path)


def test_a_type_table_that_the_class_always_has():
    """A model without segments cannot be a file of these classes, which have at least one."""
    for architecture in ("BertForMaskedLM", "AlbertForMaskedLM", "ElectraForMaskedLM"):
        conversion = huggingface.find({"architectures": [architecture]})
        with pytest.raises(UserError, match=re.escape("type_vocab_size=0 is not supported")):
            huggingface.read_section(conversion, {"type_vocab_size": 0}, where="config.json")


def test_a_tokenizer_made_here_names_its_marks(tmp_path):
    (tmp_path / "out").mkdir()
    train_tokenizer("wordpiece", 60, ["the whale swims in the sea"]).save(tmp_path / "run" / "tokenizer")
    write_files(tmp_path / "run", tmp_path / "out")
    end = "<|endoftext|>"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end,
        "unk_token": "[UNK]",
    }  # fmt: skip


def test_a_routers_balance_is_counted_otherwise_there():
    """`load_balancing_loss_func` counts each of a token's two choices as one, so its loss of equal use is 2, ours 1."""
    theirs = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "router_aux_loss_coef": 0.02}
    conversion = huggingface.find(theirs)
    section = huggingface.read_section(conversion, theirs, where="it")
    assert (section["router_balance"], section["experts_per_token"]) == (0.04, 2)
    section = configs.resolve({"model": section, "data": {"source": "stdlib"}, "train": {"steps": 200}})["model"]
    assert conversion.write(section)["router_aux_loss_coef"] == 0.02


def test_what_an_objective_adds_goes_back_with_the_tokenizer(tmp_path):
    """A mask, or sentinels, behind the tokenizer's own ids."""
    byte_tokenizer().save(tmp_path / "run" / "tokenizer")
    changes = {"mask_rate": 0.15, "span_length": None}
    for i, (objective, seq_len, names) in enumerate(
        (
            ("mask", 16, ["[MASK]"]),
            ("denoise", 16, ["[MASK]"]),
            ("span", 8, ["<extra_id_0>"]),
            ("span", 60, [f"<extra_id_{i}>" for i in range(3)]),
            ("next", 16, []),
        )
    ):
        codec, asked = byte_tokenizer(), changes if objective != "next" else dict.fromkeys(changes)
        added = objectives.marks(objectives.make(objective, seq_len, codec, **asked))
        assert added == names
        out = tmp_path / f"out{i}"
        out.mkdir()
        write_files(tmp_path / "run", out, added=added)
        found = read_tokenizer(out)
        assert [found.token_id(name) for name in names] == list(range(257, 257 + len(names)))
        settings = json.loads((out / "tokenizer_config.json").read_text())
        assert settings.get("mask_token") == ("[MASK]" if "[MASK]" in names else None)
        # Of one that has come with such marks, none are behind it, whatever the model is padded to.
        assert names == [] or objectives.marks(objectives.make(objective, seq_len, found, **asked)) == []


def test_a_prompt_begins_as_the_models_own_tokenizer_says(folder, tmp_path, monkeypatch):
    """Llama's file puts <s> before a text; GPT-2's nothing; a run that was trained here goes on after an end mark."""
    seen = []
    monkeypatch.setattr(
        "tfm_jax.decode.sample.generate",
        lambda model, params, prompts, **kw: (seen.append((prompts, kw["end_id"])), [[]])[1],
    )
    plain = folder()
    convert.bring_in(plain, tmp_path / "plain")
    engine = json.loads((plain / "tokenizer.json").read_text())
    mark = {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    engine["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": mark}
    (plain / "tokenizer.json").write_text(json.dumps(engine))
    (plain / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": [9, 10]}))
    convert.bring_in(plain, tmp_path / "marked")
    for name in ("plain", "marked"):
        generate.main([f"--run={tmp_path / name}", "--prompt=ab", "--max_new=2"])
    assert seen == [([[97, 98]], [256]), ([[7, 97, 98]], [9, 10])]
