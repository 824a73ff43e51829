import logging

import pytest

from tests.errors import says
from tfm_jax.data import vocabularies
from tfm_jax.data.sources import open_source
from tfm_jax.data.tokenizers import JsonTokenizer
from tfm_jax.data.vocabularies import open_tokenizer, train_texts, train_tokenizer


@pytest.fixture
def opened(tmp_path, books):
    with (tmp_path / "books" / "valid.txt").open("a") as file:
        file.write("ж only in validation\n")
    return open_source(f"text:{tmp_path}/books/*.txt", cache_dir=tmp_path / "cache")


def test_train_texts_are_the_train_split(opened, books):
    assert list(train_texts(opened)) == books["train"]


def test_chars_are_those_of_the_train_split(tmp_path, opened, books):
    tokenizer = open_tokenizer("chars", opened, tmp_path / "cache")
    letters = set("".join(books["train"]))
    assert "ж" not in letters and tokenizer.vocab_size == len(letters) + 2
    (ids,) = tokenizer.encode_batch(["жw"])
    assert ids[0] == tokenizer.unk_id != ids[1]


@pytest.mark.parametrize("spec", ["bpe:300", "wordpiece:200"])
def test_what_is_learnt_does_not_depend_on_validation(tmp_path, opened, spec):
    before = open_tokenizer(spec, opened, tmp_path / "cache")
    (tmp_path / "books" / "valid.txt").write_text("quite другой text " * 500)
    changed = open_source(f"text:{tmp_path}/books/*.txt", cache_dir=tmp_path / "cache2")
    assert changed.fingerprint != opened.fingerprint
    assert open_tokenizer(spec, changed, tmp_path / "cache2").fingerprint == before.fingerprint


@pytest.mark.parametrize(("kind", "size"), [("chars", 0), ("bpe", 300), ("wordpiece", 150)])
def test_training_is_deterministic(make_text, start_python, tmp_path, kind, size):
    text = make_text(0, 300)
    (tmp_path / "text").write_bytes(text.encode())
    # Another process has other hash seeds.
    code = (
        "import sys; from pathlib import Path; from tfm_jax.data.vocabularies import train_tokenizer\n"
        "texts = [Path(sys.argv[1]).read_bytes().decode()]\n"
        "print(train_tokenizer(sys.argv[2], int(sys.argv[3]), texts).fingerprint)"
    )
    children = [start_python(code, tmp_path / "text", kind, size) for _ in range(2)]
    found = {child.communicate()[0].strip() for child in children}
    assert found == {train_tokenizer(kind, size, [text]).fingerprint}


@pytest.mark.parametrize("spec", ["bpe:300", "wordpiece:70", "unigram:35"])
def test_the_size_asked_for_is_the_size_given(tmp_path, opened, spec):
    assert open_tokenizer(spec, opened, tmp_path / "cache").vocab_size == int(spec.split(":")[1])


def test_bpe_merges_the_most_frequent_pair_first():
    tokenizer = train_tokenizer("bpe", 258, ["xyxyxy ab"])
    (ids,) = tokenizer.encode_batch(["xyab"])
    assert ids.tolist()[0] == 257 and len(ids) == 3


def test_wordpiece_marks_are_not_split_off_and_unknown_words_are_unknown():
    tokenizer = train_tokenizer("wordpiece", 40, ["whale sea whale sea"])
    (ids,) = tokenizer.encode_batch(["whale Ж sea"])
    assert ids[1] == tokenizer.unk_id and tokenizer.decode(ids) == "whale sea"


def test_it_is_trained_once_and_then_read(tmp_path, opened, monkeypatch):
    first = open_tokenizer("bpe:300", opened, tmp_path / "cache")
    monkeypatch.setattr(vocabularies, "train_tokenizer", None)
    assert open_tokenizer("bpe:300", opened, tmp_path / "cache").fingerprint == first.fingerprint
    with pytest.raises(TypeError):  # another size is another tokenizer
        open_tokenizer("bpe:301", opened, tmp_path / "cache")


def test_what_a_killed_training_left_is_not_used(tmp_path, opened, monkeypatch):
    def killed(self, folder):
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonTokenizer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            open_tokenizer("chars", opened, tmp_path / "cache")
    assert open_tokenizer("chars", opened, tmp_path / "cache").vocab_size > 2
    assert not list((tmp_path / "cache" / "tokenizers").glob("*.partial"))


def test_file_and_sentencepiece_read_their_paths(tmp_path, opened, monkeypatch):
    vocabularies.byte_tokenizer().save(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_tokenizer("file:~/tokenizer.json", opened, tmp_path / "cache").vocab_size == 257
    with says(f"There is no tokenizer file {tmp_path}/x.model. Did you mean '{tmp_path}/tokenizer.json'?"):
        open_tokenizer("sentencepiece:~/x.model", opened, tmp_path / "cache")


def test_a_long_text_is_sampled_for_unigram(monkeypatch, caplog, make_text):
    texts = [make_text(seed, 20) for seed in range(40)]
    monkeypatch.setattr(vocabularies, "UNIGRAM_SAMPLE", sum(map(len, texts)) // 4 + 1)
    with caplog.at_level(logging.INFO):
        train_tokenizer("unigram", 60, texts)
    assert caplog.messages[0] == "Unigram training looks at every 4-th document, 10 in all."


def test_a_text_too_short_for_the_size_is_said(caplog):
    train_tokenizer("bpe", 1000, ["ab"])
    assert caplog.messages == ["The text gave bpe a vocabulary of 258, not 1000."]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bp:300", "data.tokenizer: unknown kind 'bp' in 'bp:300'. Did you mean 'bpe'?"),
        (
            "gpt",
            "data.tokenizer: unknown kind 'gpt' in 'gpt'. "
            "Valid: bpe, bytes, chars, file, run, sentencepiece, unigram, wordpiece, words.",
        ),
        ("bpe", "data.tokenizer: 'bpe' should look like 'bpe:N'."),
        ("chars:5", "data.tokenizer: 'chars:5' should look like 'chars'."),
        ("file:", "data.tokenizer: 'file:' should look like 'file:PATH'."),
        ("bpe:4k", "data.tokenizer: the vocabulary size in 'bpe:4k' is not a whole number."),
        ("unigram:-5", "data.tokenizer: the vocabulary size in 'unigram:-5' is not a whole number."),
        ("bpe:256", "data.tokenizer: the vocabulary of 'bpe:256' is too small; it needs at least 257."),
        ("wordpiece:2", "data.tokenizer: the vocabulary of 'wordpiece:2' is too small; it needs at least 3."),
    ],
)
def test_a_wrong_spec(tmp_path, opened, spec, message):
    with says(message):
        open_tokenizer(spec, opened, tmp_path / "cache")


def test_a_size_below_the_characters_of_the_text(tmp_path, opened, books):
    # Every character that is no space stands twice, as a word's first and inside a word, beside two marks.
    alone = 2 * len({c for c in "".join(books["train"]) if not c.isspace()}) + 2
    with says(
        f"data.tokenizer: a wordpiece vocabulary of 12 is too small for this text; its characters and the marks alone "
        f"take {alone}."
    ):
        open_tokenizer("wordpiece:12", opened, tmp_path / "cache")


def test_words_and_ends_of_lines():
    codec = train_tokenizer("words", 0, [" the white <unk> \n \n", "a  whale <|endoftext|>\n"])
    assert codec.vocab_size == 7 and codec.unk_id is not None
    assert codec.encode_batch(["a <|endoftext|>"])[0].tolist() == [codec.token_id("a"), codec.unk_id]
    ids = codec.encode_batch(["the whale \n ship"])[0].tolist()
    assert ids == [codec.token_id("the"), codec.token_id("whale"), codec.token_id("\n"), codec.unk_id]
