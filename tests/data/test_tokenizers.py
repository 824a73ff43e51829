import io
import json
import pickle
import re
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers, processors

from tests.errors import says
from tfm_jax.data.tokenizers import (
    END_MARK,
    END_MARKS,
    JsonTokenizer,
    TextStream,
    load_tokenizer,
    read_json_tokenizer,
    read_sentencepiece,
)
from tfm_jax.data.vocabularies import byte_tokenizer, train_tokenizer
from tfm_jax.errors import UserError

UNICODE = [
    "",
    " ",
    "\n\n\t x",
    "plain words, and punctuation!",
    "naïve e\u0301 Ωmega",
    "日本語のテキスト",
    "😀👨‍👩‍👧 flags 🇫🇮",
    "a\u200bb\u00a0c\ufeff\u0000d",
    "it's I'LL 12345 <|endoftext|> </s> \ufffd",
    " leading and trailing ",
]


def ids_of(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    return ids.tolist()


def trained(kind, size=0, texts=UNICODE):
    return byte_tokenizer() if kind == "bytes" else train_tokenizer(kind, size, texts)


LOSSLESS = [("bytes", 0), ("chars", 0), ("bpe", 300)]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory, make_text):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
    folder, lines = tmp_path_factory.mktemp("sp"), make_text(0, 400).splitlines()

    def train(name, size=45, **options):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, vocab_size=size, minloglevel=2, **options
        )
        (folder / name).write_bytes(out.getvalue())
        return folder / name

    return train


@pytest.mark.parametrize(("kind", "size"), LOSSLESS)
def test_the_round_trip_is_exact(kind, size):
    tokenizer = trained(kind, size)
    for text, ids in zip(UNICODE, tokenizer.encode_batch(UNICODE), strict=True):
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bytes_and_bpe_take_text_they_never_saw(kind):
    tokenizer = trained(kind, 300, ["ascii only"] * 5)
    text = "".join(chr(c) for c in [*range(1, 0x800), *range(0x4E00, 0x4E80), *range(0x1F600, 0x1F640)])
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_unigram_brings_back_text_of_its_own_characters_with_its_spaces(make_text):
    text = make_text(0, 300)
    tokenizer = train_tokenizer("unigram", 40, [text])
    for line in [*text.split("\n")[:40], "  two  spaces \n\n and lines \n"]:
        assert tokenizer.decode(ids_of(tokenizer, line)) == line
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids_of(tokenizer, text[:500])), stream.flush()]) == text[:500]


def test_byte_ids_are_the_bytes_of_utf8():
    tokenizer = byte_tokenizer()
    for text in UNICODE:
        assert ids_of(tokenizer, text) == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.unk_id) == (257, 256, None)
    assert tokenizer.decode([104, 105, 0xFF]) == "hi\ufffd"


def test_char_ids_are_ranks_in_code_point_order():
    tokenizer = train_tokenizer("chars", 0, ["hello", " wörld"])
    letters = sorted(set("hello wörld"))
    assert ids_of(tokenizer, "lwö") == [letters.index(c) for c in "lwö"]
    assert (tokenizer.vocab_size, tokenizer.unk_id, tokenizer.end_id) == (
        len(letters) + 2,
        len(letters),
        len(letters) + 1,
    )
    assert ids_of(tokenizer, "hZe") == [letters.index("h"), tokenizer.unk_id, letters.index("e")]
    assert tokenizer.decode(ids_of(tokenizer, "hZe")) == "h\ufffde"


@pytest.mark.parametrize(("kind", "size"), [*LOSSLESS, ("wordpiece", 120), ("unigram", 90)])
def test_a_literal_end_mark_in_a_text_is_not_the_end(kind, size):
    tokenizer = trained(kind, size)
    ids = ids_of(tokenizer, f"a {END_MARK} b")
    assert tokenizer.end_id not in ids and len(ids) > 3
    # The end mark itself decodes to nothing.
    assert tokenizer.decode([tokenizer.end_id]) == ""
    if (kind, size) in LOSSLESS:
        assert tokenizer.decode([tokenizer.end_id, *ids, tokenizer.end_id]) == f"a {END_MARK} b"


@pytest.mark.parametrize(("kind", "size"), [*LOSSLESS, ("wordpiece", 120), ("unigram", 90)])
def test_saved_and_pickled_tokenizers_give_the_same_ids(tmp_path, kind, size):
    tokenizer = trained(kind, size)
    expected = [ids.tolist() for ids in tokenizer.encode_batch(UNICODE)]  # fills the caches that must not travel
    tokenizer.save(tmp_path / "deep" / "run")
    for again in (load_tokenizer(str(tmp_path / "deep" / "run")), pickle.loads(pickle.dumps(tokenizer))):
        assert [ids.tolist() for ids in again.encode_batch(UNICODE)] == expected
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.end_id, again.unk_id) == (
            tokenizer.vocab_size,
            tokenizer.end_id,
            tokenizer.unk_id,
        )


def test_tokenizers_that_differ_have_other_fingerprints():
    found = {
        trained(kind, size).fingerprint for kind, size in [*LOSSLESS, ("bpe", 310), ("wordpiece", 120), ("unigram", 90)]
    }
    assert len(found) == len(LOSSLESS) + 3


@pytest.mark.parametrize(("kind", "size"), [*LOSSLESS, ("bpe", 340)])
def test_a_stream_never_gives_half_a_character_and_joins_to_the_whole(kind, size):
    tokenizer = trained(kind, size)
    for text in [text.replace("\ufffd", "") for text in UNICODE]:
        stream, shown = TextStream(tokenizer), ""
        for given in ids_of(tokenizer, text):
            shown += stream.push(given)
            assert text.startswith(shown)  # so it holds no U+FFFD of a cut character
        assert shown + stream.flush() == text


def test_a_stream_gives_a_character_as_soon_as_it_is_whole():
    stream = TextStream(byte_tokenizer())
    assert [stream.push(byte) for byte in "aé😀b".encode()] == ["a", "", "é", "", "", "", "😀", "b"]
    assert stream.push(np.array(list("日本".encode()))) == "日本"
    assert stream.push(np.int32(0xE6)) == "" and stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_a_stream_keeps_the_spaces_that_a_decoder_drops_before_a_first_word():
    tokenizer = train_tokenizer("wordpiece", 60, ["the whale and the sea " * 5])
    ids = ids_of(tokenizer, "the sea and the whale")
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids) == "the sea and the whale"


def test_a_stream_over_a_long_text_looks_at_few_ids():
    class Counting:
        longest, inner = 0, byte_tokenizer()

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return self.inner.decode(ids)

    counting = Counting()
    stream = TextStream(counting)
    assert "".join(map(stream.push, ("aé😀" * 200).encode())) == "aé😀" * 200
    assert counting.longest <= 8


def write_engine(path, mark="[SEP]", unknown="[UNK]"):
    engine = Engine(models.WordLevel({"a": 0, "b": 1, unknown: 2, "c": 3}, unk_token=unknown))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    if mark:
        engine.add_special_tokens([mark])
    engine.enable_truncation(2)
    engine.enable_padding(length=6, pad_id=3)
    engine.save(str(path))


def test_a_file_s_truncation_and_padding_are_switched_off(tmp_path):
    write_engine(tmp_path / "t.json")
    direct = Engine.from_file(str(tmp_path / "t.json"))
    assert direct.encode("a b c x").ids == [0, 1, 3, 3, 3, 3]  # the file does ask for both
    tokenizer = read_json_tokenizer(tmp_path / "t.json")
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a b c x", "b"])] == [[0, 1, 3, 2], [1]]
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.unk_id) == (5, 4, 2)
    assert json.loads(tokenizer.json)["truncation"]["max_length"] == 2  # kept as the file has it


@pytest.mark.parametrize("mark", END_MARKS)
def test_every_known_end_mark_is_found(tmp_path, mark):
    write_engine(tmp_path / "t.json", mark)
    assert read_json_tokenizer(tmp_path / "t.json").end_id == 4


def test_the_first_end_mark_of_the_list_wins(tmp_path):
    engine = Engine(models.WordLevel({"[SEP]": 0, "</s>": 1, "x": 2}, unk_token="x"))
    engine.save(str(tmp_path / "t.json"))
    assert read_json_tokenizer(tmp_path / "t.json").end_id == 1


def test_what_a_file_puts_behind_a_text_ends_it(tmp_path):
    """RoBERTa's and BART's vocabularies have GPT-2's mark among their words."""
    engine = Engine(models.WordLevel({"<|endoftext|>": 0, "<s>": 1, "</s>": 2, "a": 3, "x": 4}, unk_token="x"))
    engine.add_special_tokens(["<s>", "</s>"])
    engine.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    engine.save(str(tmp_path / "t.json"))
    assert read_json_tokenizer(tmp_path / "t.json").end_id == 2
    # Behind the text itself: NLLB's puts the language there as well. And of words that it knows.
    engine = Engine(models.WordLevel({"<|endoftext|>": 0, "<s>": 1, "</s>": 2, "e4": 3, "e5": 4}))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(["<s>", "</s>"])
    engine.post_processor = processors.TemplateProcessing(
        single="$A </s> <s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    engine.save(str(tmp_path / "t.json"))
    assert read_json_tokenizer(tmp_path / "t.json").end_id == 2
    # One that only begins a text does not say what ends it.
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    engine.save(str(tmp_path / "t.json"))
    assert read_json_tokenizer(tmp_path / "t.json").end_id == 0


def test_a_file_without_an_end_mark(tmp_path):
    write_engine(tmp_path / "t.json", mark=None)
    with says(
        f"{tmp_path}/t.json has no end-of-document mark; looked for <|endoftext|>, </s>, <eos>, [EOS], "
        f"<|end_of_text|>, <|im_end|>, [SEP]."
    ):
        read_json_tokenizer(tmp_path / "t.json")


def test_a_file_that_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(UserError, match=f"^{re.escape(f'{path} is not a tokenizer.json: ')}.+\\.$"):
        read_json_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with says(f"{path} is not a tokenizer.json: it is not UTF-8 text."):
        read_json_tokenizer(path)


def test_a_file_that_is_not_there(tmp_path):
    write_engine(tmp_path / "tokenizer.json")
    with says(f"There is no tokenizer file {tmp_path}/tokeniser.json. Did you mean '{tmp_path}/tokenizer.json'?"):
        read_json_tokenizer(tmp_path / "tokeniser.json")
    with says(f"There is no tokenizer file {tmp_path}/none/x.model."):
        read_sentencepiece(tmp_path / "none" / "x.model")


def test_a_folder_without_a_tokenizer(tmp_path):
    gone = tmp_path / "gone"
    with says(
        f"There is no {gone}, whose tokenizer is asked for (data.tokenizer=run:{gone}). A run of that name is trained, or made of"
        f" somebody's model: python -m experiments.convert --from hf:FOLDER --to {gone}."
    ):
        load_tokenizer(gone / "tokenizer")
    with says(f"{tmp_path} holds no tokenizer: neither tokenizer.json nor tokenizer.model is there."):
        load_tokenizer(tmp_path)


def test_sentencepiece_gives_the_library_s_ids(tmp_path, make_text, sentencepiece_file):
    import sentencepiece

    path = sentencepiece_file("plain.model")
    direct = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = read_sentencepiece(path)
    lines = [line for line in make_text(9, 30).splitlines() if line]
    expected = [direct.encode(line) for line in lines]
    assert [ids.tolist() for ids in tokenizer.encode_batch(lines)] == expected
    assert [tokenizer.decode(ids) for ids in expected] == [direct.decode(ids) for ids in expected]
    assert (tokenizer.vocab_size, tokenizer.unk_id) == (45, direct.unk_id())
    assert tokenizer.end_id == direct.eos_id() == direct.piece_to_id("</s>")
    assert tokenizer.end_id not in tokenizer.encode_batch(["the </s> sea"])[0]
    assert tokenizer.decode([*expected[0], 45, 1000]) == direct.decode(expected[0])  # a padded vocabulary's ids
    tokenizer.save(tmp_path / "run")
    for again in (load_tokenizer(tmp_path / "run"), pickle.loads(pickle.dumps(tokenizer))):
        assert [ids.tolist() for ids in again.encode_batch(lines)] == expected
        assert again.fingerprint == tokenizer.fingerprint and again.end_id == tokenizer.end_id


def test_a_stream_over_sentencepiece_joins_to_the_whole(sentencepiece_file):
    tokenizer = read_sentencepiece(sentencepiece_file("fallback.model", 300, byte_fallback=True))
    ids = ids_of(tokenizer, "the sea 😀 captain 語 ∀ whale")
    stream = TextStream(tokenizer)
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) + stream.flush() == tokenizer.decode(ids) == "the sea 😀 captain 語 ∀ whale"
    assert not any("\ufffd" in part for part in shown)


def test_a_sentencepiece_end_mark_by_name_or_none(sentencepiece_file):
    named = read_sentencepiece(sentencepiece_file("named.model", eos_id=-1, user_defined_symbols=[END_MARK]))
    assert named._engine.id_to_piece(named.end_id) == END_MARK
    path = sentencepiece_file("none.model", eos_id=-1)
    with says(f"{path} has no end-of-document mark; looked for {', '.join(END_MARKS)}."):
        read_sentencepiece(path)


def test_a_file_that_is_no_sentencepiece_model(tmp_path):
    pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=f"^{re.escape(f'{tmp_path}/x.model is not a SentencePiece model: ')}"):
        read_sentencepiece(tmp_path / "x.model")


def test_a_missing_sentencepiece_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "x.model").write_bytes(b"x")
    message = "A sentencepiece: tokenizer needs the sentencepiece package: pip install 'tfm_jax[sentencepiece]'."
    with says(message):
        read_sentencepiece(tmp_path / "x.model")


def test_a_tokenizer_is_only_its_text():
    assert JsonTokenizer(byte_tokenizer().json, "elsewhere").fingerprint == byte_tokenizer().fingerprint
