"""What is trained here goes to `transformers` and comes back: the models of all configs, and one in two parts."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import convert
from tests.test_configs import FOLDER, SMOKE, _filled
from tfm_jax import config as configs
from tfm_jax.convert import huggingface
from tfm_jax.convert.weights import read_parts, write_tensors_of
from tfm_jax.data.vocabularies import train_tokenizer
from tfm_jax.errors import UserError
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model
from tfm_jax.train.restore import load_params
from tfm_jax.train.run import train

ALONE = ("transformer_xl",)  # no class there computes the same


@pytest.mark.parametrize("name", SMOKE)
def test_every_config_there_and_back(name):
    section = configs.resolve(configs.load(f"{FOLDER}/{name}.py:smoke"))["model"]
    section = {k: _filled(k, v) for k, v in section.items() if k != "classes" or "image_size" in section}
    if section["name"] in ALONE:
        with pytest.raises(UserError, match="has no class in transformers that is the same"):
            huggingface.for_export(section)
        return
    model = build_model(section)
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]
    params = jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(x.dtype), shapes)
    parts = huggingface.for_export(section)
    theirs = {}
    for part, (conversion, own) in parts.items():
        shapes, make = write_tensors_of(conversion, own, params)
        theirs[part] = {key: make(key) for key in shapes}
        assert {key: x.shape for key, x in theirs[part].items()} == shapes
    conversions, sections = ({part: found[i] for part, found in parts.items()} for i in (0, 1))
    again = read_parts(conversions, sections, jax.eval_shape(lambda: params), theirs, where="it")
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.journey
def test_an_image_run_goes_back_with_its_classes_and_settings(tmp_path):
    """Classes by the names of the import, whatever their order in the folder; and the settings of a tuned run."""
    from PIL import Image

    from experiments import evaluate
    from tfm_jax.convert import images

    draw = np.random.default_rng(0)
    for place, name in enumerate(("cat", "dog", "fox")):
        for split, count in (("train", 12), ("val", 4)):
            (tmp_path / "pics" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(60 + 60 * place + draw.normal(0, 5, (16, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pics" / split / name / f"{i}.png")
    data = {"name": "images", "source": f"folder:{tmp_path}/pics/**", "image_size": 8, "batch_size": 8, "fit": "squeeze",
            "classes": ["fox", "cat", "dog"]}  # fmt: skip
    model = {"name": "vit", "image_size": 8, "patch": 4, "layers": 1, "width": 16, "heads": 2, "init": "xavier"}
    config = {"model": model, "task": {"name": "classification"}, "data": data, "train": {"steps": 60},
              "optim": {"lr": 1e-2, "warmup_steps": 2}, "evals": {"validation": {"split": "validation"}},
              "log": {"tensorboard": False}}  # fmt: skip
    done = train(configs.resolve(config), tmp_path / "run")
    assert done.result["eval/validation/accuracy"] == 1.0
    convert.give_back(tmp_path / "run", tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert theirs["id2label"] == {"0": "fox", "1": "cat", "2": "dog"}
    settings = json.loads((tmp_path / "theirs" / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "ViTImageProcessor" and settings["size"] == {"height": 8, "width": 8}
    want = {key: config["data"][key] for key in ("image_size", "fit", "classes")}
    found = images.read_settings(tmp_path / "theirs") | images.read_classes(theirs)
    assert {**found, **want, "resample": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3} == found
    convert.bring_in(tmp_path / "theirs", tmp_path / "again")
    result = tmp_path / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, **k: result.write_text(str(a[0])))
        evaluate.main([f"--run={tmp_path / 'again'}", f"--config.data.source=folder:{tmp_path}/pics/**", "--json"])
    assert json.loads(result.read_text())["eval/validation/accuracy"] == 1.0
    (tmp_path / "pics" / "train" / "wolf").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pics" / "train" / "wolf" / "0.png")
    with pytest.raises(UserError, match=r"^data\.classes has no 'wolf', which the source has\."):
        evaluate.main([f"--run={tmp_path / 'again'}", f"--config.data.source=folder:{tmp_path}/pics/**"])


@pytest.mark.journey
def test_decoders_begin_as_they_were_trained(corpus, tmp_path):
    changes = [("data.source", f"text:{corpus}/*.txt"), ("train.steps", "1"), ("optim.warmup_steps", "0"),
               ("train.eval_every", "0"), ("data.decoder_start", "7")]  # fmt: skip
    train(configs.resolve(configs.load(f"{FOLDER}/t5_stdlib.py:smoke"), changes), tmp_path / "run")
    convert.give_back(tmp_path / "run", tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (theirs["decoder_start_token_id"], theirs["eos_token_id"]) == (7, 256)
    vocab = json.loads((tmp_path / "theirs" / "tokenizer.json").read_text())["added_tokens"]
    assert theirs["vocab_size"] == max(token["id"] for token in vocab) + 1
    # And what a run that begins from it would do otherwise is said.
    from tfm_jax.train.restore import _differences

    own = configs.resolve(
        configs.load(f"{FOLDER}/t5_stdlib.py:smoke"), [("data.decoder_start", "0"), ("model.vocab_size", "260")]
    )
    lines = _differences(tmp_path / "run", own, train_tokenizer("wordpiece", 60, ["some words"]))
    assert lines == [
        "data.decoder_start: 7 there, 0 here",
        f"data.tokenizer: another than the donor's, which is data.tokenizer=run:{tmp_path / 'run'}",
    ]


@pytest.fixture(scope="module")
def electra(tmp_path_factory, corpus):
    """A run of the smoke form, and its model given back."""
    base = tmp_path_factory.mktemp("electra")
    changes = [("data.source", f"text:{corpus}/*.txt"), ("train.steps", "1"), ("optim.warmup_steps", "0"),
               ("train.eval_every", "0"), ("model.types", "1")]  # fmt: skip
    train(configs.resolve(configs.load(f"{FOLDER}/electra_stdlib.py:smoke"), changes), base / "run")
    convert.give_back(base / "run", base / "theirs")
    return base


@pytest.mark.journey
def test_electra_is_a_folder_for_each_half(electra, tmp_path):
    assert sorted(p.name for p in (electra / "theirs").iterdir()) == ["discriminator", "generator"]
    known = json.loads((electra / "theirs" / "generator" / "config.json").read_text())
    assert known["architectures"] == ["ElectraForMaskedLM"] and known["hidden_size"] == 16
    record = convert.bring_in(electra / "theirs", tmp_path / "again")
    assert record["architecture"] == "ElectraForMaskedLM, ElectraForPreTraining"
    ours, again = load_params(electra / "run")[0], load_params(tmp_path / "again")[0]
    assert flatten(ours).keys() == flatten(again).keys()
    jax.tree.map(np.testing.assert_array_equal, ours, again)
    # A half is a model of its own.
    convert.bring_in(electra / "theirs" / "discriminator", tmp_path / "half")
    half = load_params(tmp_path / "half")[0]
    jax.tree.map(np.testing.assert_array_equal, half, {name: ours[name] for name in half})


@pytest.mark.journey
def test_halves_that_do_not_belong_together(electra, tmp_path):
    shutil.copytree(electra / "theirs", tmp_path / "theirs")
    weights, config = (tmp_path / "theirs" / "generator" / name for name in ("model.safetensors", "config.json"))
    arrays = safetensors.numpy.load_file(weights)
    name = "electra.embeddings.position_embeddings.weight"
    safetensors.numpy.save_file({**arrays, name: arrays[name] + 1}, weights)
    with pytest.raises(UserError) as error:
        convert.bring_in(tmp_path / "theirs", tmp_path / "run")
    assert str(error.value).splitlines() == [
        f"{tmp_path}/theirs: its parts share these, but differ in them:",
        "  embeddings/position_embedding/embedding",
    ]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 60, "num_hidden_layers": 3}))
    with pytest.raises(UserError) as error:
        convert.bring_in(tmp_path / "theirs", tmp_path / "run")
    assert str(error.value).splitlines()[1:] == [
        "  layers: 3 and 2",
        "  mlp_width: 60 and 128 are not as 2 to 4 heads",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parity
def test_transformers_reads_both_halves(electra):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = build_model(configs.resolve(json.loads((electra / "run" / "config.json").read_text()))["model"])
    params, _ = load_params(electra / "run")
    tokens = np.random.default_rng(0).integers(0, 257, (2, 9))
    ours = model.apply({"params": params}, tokens=tokens.astype(np.int32), corrupted=tokens.astype(np.int32))
    for part, name, output in (
        ("generator", "ElectraForMaskedLM", "logits"),
        ("discriminator", "ElectraForPreTraining", "replaced_logits"),
    ):
        theirs = getattr(transformers, name).from_pretrained(electra / "theirs" / part).eval()
        with torch.no_grad():
            want = theirs(torch.from_numpy(tokens)).logits.numpy()
        np.testing.assert_allclose(ours[output], want, rtol=0, atol=1e-5)
