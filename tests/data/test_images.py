"""Image batches: pure functions of (seed, step), each example varied by itself, exact passes, and every kind of source."""

import gzip
import re

import numpy as np
import pytest

from tests.errors import says
from tfm_jax.data.images import Training, make, varied
from tfm_jax.data.index import epoch_records
from tfm_jax.errors import UserError

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
    return make(source="digits", batch_size=16, seed=3)


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(x, y) for x, y in ((a["inputs"]["images"], b["inputs"]["images"]), (a["targets"], b["targets"]))
    )


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    theirs = {(x.tobytes(), int(y)) for x, y in zip(load_digits().images, load_digits().target, strict=True)}
    assert digits.sizes == {"classes": 10} and digits.vocab_size is None and digits.tokenizer is None
    seen = []
    for split in ("train", "validation"):
        dataset = digits.evals(split, 100)
        for i in range(dataset.num_batches):
            batch = dataset.batch_at(i)
            assert batch["inputs"]["images"].dtype == np.float32 and batch["targets"].dtype == np.int32
            kept = batch["weights"] > 0
            # From [-1, 1] back to the 17 shades.
            shades = np.round((batch["inputs"]["images"][kept, :, :, 0] + 1) * 8).astype(np.float64)
            seen += [(x.tobytes(), int(y)) for x, y in zip(shades, batch["targets"][kept], strict=True)]
    assert len(seen) == 1797 and set(seen) == theirs
    counts = {name: facts["examples"] for name, facts in digits.facts.items()}
    assert sum(counts.values()) == 1797 and 0.08 < counts["validation"] / 1797 < 0.12


def test_batches_are_a_pure_function_of_seed_and_step(digits):
    again, other = make(source="digits", batch_size=16, seed=3), make(source="digits", batch_size=16, seed=4)
    for step in (0, 7, 500):
        assert same(digits.train.batch_at(step), again.train.batch_at(step))
        assert not same(digits.train.batch_at(step), other.train.batch_at(step))
    assert again.fingerprint == digits.fingerprint == other.fingerprint
    assert make(source="digits", mean=(0.4,)).fingerprint != digits.fingerprint


def test_an_epoch_shows_every_image_once(digits):
    size = digits.facts["train"]["examples"]
    _, index = zip(*(epoch_records(step, 16, size, 3) for step in range(-(-size // 16))), strict=True)
    assert sorted(np.concatenate(index)[:size]) == list(range(size))
    step = size // 16 - 1
    want, _ = digits.train.pictures.read(epoch_records(step, 16, size, 3).record)
    np.testing.assert_allclose(digits.train.batch_at(step)["inputs"]["images"], want / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("rows", [slice(4, 9), np.array([0, 3, 15])])
def test_rows_are_those_of_the_whole_batch(rows):
    train = make(source="digits", batch_size=16, crop_padding=2, flip=0.5).train
    whole, part = train.batch_at(11), train.batch_at(11, rows)
    np.testing.assert_array_equal(part["inputs"]["images"], whole["inputs"]["images"][rows])
    np.testing.assert_array_equal(part["targets"], whole["targets"][rows])


def test_a_pass_is_exact_and_padded(digits):
    dataset = digits.evals("validation", 50)
    size = digits.facts["validation"]["examples"]
    weights = np.concatenate([dataset.batch_at(i)["weights"] for i in range(dataset.num_batches)])
    assert dataset.num_batches == -(-size // 50) and weights.sum() == size
    assert np.all(weights[:size] == 1) and np.all(weights[size:] == 0)
    assert dataset.batch_at(dataset.num_batches - 1)["inputs"]["images"].shape == (50, 8, 8, 1)


def test_every_shift_and_mirror_comes_up():
    """A window of a padded image, against every one that there can be, cut by hand."""
    image = DRAW.integers(1, 256, (4, 5, 2), dtype=np.uint8)
    wide = np.zeros((4 + 4, 5 + 4, 2), np.uint8)
    wide[2:6, 2:7] = image
    options = {}
    for y in range(5):
        for x in range(5):
            window = wide[y : y + 4, x : x + 5]
            options[window.tobytes()] = (y, x, False)
            options[window[:, ::-1].tobytes()] = (y, x, True)
    got = varied(np.repeat(image[None], 2000, 0), DRAW.integers(0, 2**63, 2000).astype(np.uint64), 2, 0.25)
    found = [options[np.ascontiguousarray(x).tobytes()] for x in got]
    assert len(set(found)) == 50
    assert abs(np.mean([mirrored for _, _, mirrored in found]) - 0.25) < 0.04
    for axis in (0, 1):
        places = np.bincount([place[axis] for place in found], minlength=5)
        assert np.all(np.abs(places - 400) < 80), places


def test_nothing_is_varied_unless_asked():
    images = DRAW.integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    draws = DRAW.integers(0, 2**63, 50).astype(np.uint64)
    np.testing.assert_array_equal(varied(images, draws, 0, 0.0), images)
    np.testing.assert_array_equal(varied(images, draws, 0, 1.0), images[:, :, ::-1])


def test_an_image_is_varied_anew_each_epoch_and_not_in_evaluation():
    data = make(source="digits", batch_size=4, crop_padding=2)
    plain, train = make(source="digits", batch_size=4).train, data.train
    assert isinstance(train, Training)
    size = data.facts["train"]["examples"]
    places = {}
    for step in range(-(-2 * size // 4)):
        for row, (epoch, record) in enumerate(zip(*epoch_records(step, 4, size, 0), strict=True)):
            if record < 20:
                places.setdefault(int(record), []).append((int(epoch), step, row))
    moved = 0
    for first, second in (pair[:2] for pair in places.values()):
        assert (first[0], second[0]) == (0, 1)
        one, two = (train.batch_at(step)["inputs"]["images"][row] for _, step, row in (first, second))
        still = [plain.batch_at(step)["inputs"]["images"][row] for _, step, row in (first, second)]
        np.testing.assert_array_equal(*still)
        moved += not np.array_equal(one, two)
    assert moved > 15
    np.testing.assert_array_equal(
        data.evals("train", 4).batch_at(0)["inputs"]["images"],
        make(source="digits").evals("train", 4).batch_at(0)["inputs"]["images"],
    )


def test_normalisation_is_by_channel(tmp_path):
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    data = make(source=f"folder:{tmp_path}/**/*.png", batch_size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    images, _ = data.evals("train", 2).pictures.read(np.arange(2))
    got = data.evals("train", 2).batch_at(0)["inputs"]["images"]
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 1.0))):
        np.testing.assert_allclose(got[..., channel], (images[..., channel] / 255 - mean) / std, atol=1e-5)


def test_scaled_then_cut(tmp_path):
    """`squeeze` keeps all of an image, `cover` its shape; then the middle is taken."""
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200  # the middle half
    for i in range(9):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(wide).save(tmp_path / "train" / "a" / f"{i}.png")

    def first(**settings):
        data = make(
            source=f"folder:{tmp_path}/**/*.png", batch_size=1, resample="bilinear", valid_fraction=0.5, **settings
        )
        return data.train.pictures.read(np.zeros(1, np.int64)).images[0]

    assert np.all(first(image_size=8) == 200)
    squeezed = np.asarray(Image.fromarray(wide).resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(first(image_size=8, fit="squeeze"), squeezed)
    np.testing.assert_array_equal(first(image_size=4, scaled_to=8, fit="squeeze"), squeezed[2:6, 2:6])
    with says("data.scaled_to=4: must be at least data.image_size, which is 8."):
        make(source="digits", image_size=8, scaled_to=4)


def write_folder(base, counts, size=(6, 6), mode="RGB"):
    """Images named by a number that their first pixel holds, in a folder a class."""
    for place, (name, count) in enumerate(counts.items()):
        (base / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            depth = (3,) if mode == "RGB" else ()
            array = np.full((*size, *depth), 10 * place + i, np.uint8)
            Image.fromarray(array, mode=mode).save(base / name / f"{i}.png")


def contents(data, split):
    dataset = data.evals(split, 64)
    assert dataset.num_batches == 1
    batch = dataset.batch_at(0)
    kept = batch["weights"] > 0
    values = np.round((batch["inputs"]["images"][kept, 0, 0, 0] + 1) * 127.5).astype(int)
    return sorted(zip(values.tolist(), batch["targets"][kept].tolist(), strict=True))


def test_a_folder_with_splits(tmp_path):
    write_folder(tmp_path / "train", {"cat": 3, "dog": 2})
    write_folder(tmp_path / "val", {"cat": 1, "dog": 2})
    source = f"folder:{tmp_path}/**/*.png"
    data = make(source=source, batch_size=2)
    assert make(source=f"folder:{tmp_path}").fingerprint == make(source=source).fingerprint
    assert contents(data, "train") == [(0, 0), (1, 0), (2, 0), (10, 1), (11, 1)]
    assert contents(data, "validation") == [(0, 0), (10, 1), (11, 1)]
    assert data.train.batch_at(0)["inputs"]["images"].shape == (2, 6, 6, 3) and data.sizes == {"classes": 2}
    with says(f"data.source={source!r} has no split 'test'. Valid: train, validation."):
        data.evals("test", None)


def test_a_folder_without_splits_is_split_by_a_hash_of_the_path(tmp_path):
    write_folder(tmp_path, {"cat": 9, "dog": 9})
    data = make(source=f"folder:{tmp_path}/*/*.png", batch_size=2, valid_fraction=0.3)
    train, held = contents(data, "train"), contents(data, "validation")
    assert held and sorted(train + held) == [(i, 0) for i in range(9)] + [(10 + i, 1) for i in range(9)]
    moved = tmp_path.parent / f"{tmp_path.name}_moved"
    tmp_path.rename(moved)
    again = make(source=f"folder:{moved}/*/*.png", batch_size=2, valid_fraction=0.3)
    assert contents(again, "validation") == held and again.fingerprint == data.fingerprint


def test_sizes_and_channels(tmp_path):
    """Scaled until the square is covered, the middle taken: two halves of a wide image stay on their sides."""
    write_folder(tmp_path / "val", {"x": 1})
    (tmp_path / "train" / "x").mkdir(parents=True)
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 12:] = 200
    Image.fromarray(wide).save(tmp_path / "train" / "x" / "a.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "train" / "x" / "b.png")
    source = f"folder:{tmp_path}/*/*/*.png"
    data = make(source=source, batch_size=2, image_size=4, channels=3, mean=(0.0,), std=(1.0,))
    image = data.evals("train", 1).batch_at(0)["inputs"]["images"][0] * 255
    assert image.shape == (4, 4, 3)
    assert np.all(image[:, 0] < 30) and np.all(image[:, 3] > 170)
    folder = tmp_path / "train" / "x"
    with says(
        f"{folder}/b.png is 4 x 4 x 3, but {folder}/a.png is 8 x 24 x 1: images of several shapes need data.image_size"
        " and data.channels."
    ):
        make(source=source, batch_size=2).evals("train", 2).batch_at(0)


def test_digits_are_resized_and_coloured():
    plain = make(source="digits", batch_size=4).evals("train", 4).batch_at(0)["inputs"]["images"]
    got = make(source="digits", batch_size=4, image_size=16, channels=3).evals("train", 4).batch_at(0)
    images = got["inputs"]["images"]
    assert images.shape == (4, 16, 16, 3) and np.array_equal(images[..., 0], images[..., 2])
    # Halved again by averaging, it is the same picture but for the overshoot of the cubic filter.
    halved = images[..., :1].reshape(4, 8, 2, 8, 2, 1).mean((2, 4))
    assert np.corrcoef(halved.ravel(), plain.ravel())[0, 1] > 0.98


def write_idx(path, array, zipped):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, zipped):
    arrays = {}
    for prefix, count in (("train", 40), ("t10k", 7)):
        arrays[prefix] = DRAW.integers(0, 256, (count, 5, 4)), np.arange(count) % 3
        for name, array in zip(("images-idx3", "labels-idx1"), arrays[prefix], strict=True):
            write_idx(tmp_path / f"{prefix}-{name}-ubyte{'.gz' * zipped}", array, zipped)
    data = make(source=f"idx:{tmp_path}", batch_size=7, mean=(0.0,), std=(1.0,))
    batch = data.evals("test", 7).batch_at(0)
    np.testing.assert_allclose(batch["inputs"]["images"][..., 0] * 255, arrays["t10k"][0], atol=1e-3)
    np.testing.assert_array_equal(batch["targets"], arrays["t10k"][1])
    assert data.sizes == {"classes": 3}
    assert data.facts["train"]["examples"] + data.facts["validation"]["examples"] == 40
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' * zipped}"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03123") if zipped else b"\0\0\x08\x03123")
    with says(f"{path} is not an IDX file of bytes, or it is cut off."):
        make(source=f"idx:{tmp_path}")
    path.rename(tmp_path / "train-images")
    with pytest.raises(UserError, match=f"^idx:{re.escape(str(tmp_path))} has no train-images-idx3-ubyte, and no"):
        make(source=f"idx:{tmp_path}")


BUILDER = """
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Shapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({
            "picture": tfds.features.Image(shape=(None, None, 3)),
            "kind": tfds.features.ClassLabel(names=["cat", "dog", "cow"]),
        })
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(file, "png")
            file.seek(0)
            yield i, {"picture": file, "kind": i % 3}
"""


def test_tfds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / "lab_shapes.py").write_text(BUILDER)
    data = make(source="tfds:lab_shapes:Shapes", batch_size=4)
    assert contents(data, "test") == [(i, i % 3) for i in range(5)] and data.sizes == {"classes": 3}
    train, held = contents(data, "train"), contents(data, "validation")
    assert held and sorted(train + held) == [(i, i % 3) for i in range(30)]
    assert data.train.batch_at(3)["inputs"]["images"].shape == (4, 6, 6, 3)
    with says("tfds:shapes/1.0.0 has no label 'king'. Did you mean 'kind'?"):
        make(source="tfds:lab_shapes:Shapes", label="king")


@pytest.mark.shared_data
def test_real_sets(shared_data, tmp_path):
    import tarfile

    fashion = make(source=f"idx:{shared_data / 'fashion_mnist'}", batch_size=8)
    assert fashion.train.batch_at(0)["inputs"]["images"].shape == (8, 28, 28, 1)
    assert fashion.facts["test"]["examples"] == 10_000 and fashion.sizes == {"classes": 10}
    assert fashion.facts["train"]["examples"] + fashion.facts["validation"]["examples"] == 60_000
    # Of CIFAR-10 the first hundred; any prefix is balanced.
    with tarfile.open(shared_data / "cifar10_jpeg" / "test.tar.gz") as archive:
        files = [member for member in archive if member.isfile()][:100]
        archive.extractall(tmp_path, files, filter="data")
    cifar = make(source=f"folder:{tmp_path}/**/*.jpg", batch_size=8, valid_fraction=0.2)
    assert cifar.train.batch_at(0)["inputs"]["images"].shape == (8, 32, 32, 3) and cifar.sizes == {"classes": 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(source="digit"), "data.source: unknown kind 'digit' in 'digit'. Did you mean 'digits'?"),
        (dict(source="digits:x"), "data.source: 'digits:x' should look like 'digits'."),
        (dict(source="digits", label="x"), "data.label is 'x', but a digits source has one label only."),
        (dict(source="digits", image_size=0), "data.image_size=0: must be at least 1."),
        (dict(source="digits", batch_size=0), "data.batch_size=0: must be at least 1."),
        (dict(source="digits", channels=2), "data.channels=2: 1 for grey or 3 for colour."),
        (dict(source="digits", crop_padding=-1), "data.crop_padding=-1: must be at least 0."),
        (dict(source="digits", flip=1.5), "data.flip=1.5: a probability in [0, 1]."),
        (
            dict(source="digits", mean=(0.5, 0.5)),
            "data.mean=(0.5, 0.5): one value, or one for each of 1 channels.",
        ),
        (dict(source="digits", std=(0.0,)), "data.std=(0.0,): must be above 0."),
        (dict(source="digits", valid_fraction=1.0), "data.valid_fraction is 1.0; it must lie between 0 and 1."),
        (
            dict(source="digits", valid_fraction=1e-9),
            "data.source='digits' leaves no image for validation; set data.valid_fraction.",
        ),
        (dict(source="folder:/nowhere/*.png"), "data.source: folder:/nowhere/*.png matches no file."),
    ],
)
def test_errors(arguments, message):
    with says(message):
        make(**arguments)


def test_errors_in_folders(tmp_path):
    write_folder(tmp_path / "train", {"cat": 1})
    write_folder(tmp_path / "val", {"cab": 1})
    source = f"folder:{tmp_path}/**/*.*"
    with says(f"{tmp_path}/val/cab/0.png is of a class with no training image. Did you mean 'cat'?"):
        make(source=source)
    (tmp_path / "val" / "cab").rename(tmp_path / "val" / "cat")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"notes.txt cannot be read as an image: "):
        make(source=source).evals("train", 2).batch_at(0)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("sklearn.datasets", "digits", "data.source='digits' needs scikit-learn, which the data set comes with: pip"
         " install 'tfm_jax[vision]'."),
        ("PIL", "folder:x", "A folder of images needs Pillow: pip install 'tfm_jax[vision]'."),
    ],
)  # fmt: skip
def test_packages_that_are_not_there(monkeypatch, module, source, message):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with says(message):
        make(source=source)
