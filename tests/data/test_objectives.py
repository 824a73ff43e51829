"""What each objective hides and asks for: published rates, nothing lost, and each row a function of its seed."""

import gzip
import itertools
import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from tests.errors import says
from tfm_jax.data import tokens
from tfm_jax.data.noise import Denoise, Mask
from tfm_jax.data.objectives import fingerprint, make
from tfm_jax.data.spelling import spelled, word_parts
from tfm_jax.data.tokenizers import JsonTokenizer
from tfm_jax.data.types import Frame
from tfm_jax.data.vocabularies import byte_tokenizer, train_tokenizer

END, FIRST, B = 256, 257, 400
TOKENIZER = byte_tokenizer()


def rows(objective, seed=0, count=B):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (count, objective.window + 1)).astype(np.int32)
    tokens[:, ::17] = END
    return tokens, np.ones(tokens.shape, bool), np.arange(count, dtype=np.uint64) + np.uint64(1000 * seed)


def made(name, seq_len=64, mask_rate=None, span_length=None):
    return make(name, seq_len, TOKENIZER, mask_rate=mask_rate, span_length=span_length)


def leaves(batch):
    return {**batch["inputs"], "targets": batch["targets"], "weights": batch["weights"]}


@pytest.mark.parametrize("name", ["next", "mask", "span", "denoise", "continue", "prefix", "prefix_lm"])
def test_rows_are_functions_of_their_seeds(name):
    objective = made(name)
    tokens, known, seeds = rows(objective)
    whole = leaves(objective.batch(tokens, known, seeds))
    some = np.array([7, 3, 200])
    part = leaves(objective.batch(tokens[some], known[some], seeds[some]))
    for key, x in whole.items():
        np.testing.assert_array_equal(part[key], x[some], err_msg=key)
    other = leaves(objective.batch(tokens, known, seeds + np.uint64(B)))
    changed = "weights" if name == "prefix_lm" else "tokens"
    assert name in ("next", "continue") or np.any(other[changed] != whole[changed])
    ids = max(x.max() for key, x in whole.items() if x.dtype == np.int32)
    assert ids < TOKENIZER.vocab_size + objective.added


def test_masking_has_berts_rates():
    """15 % of the tokens; of those 80 % hidden, 10 % replaced, 10 % left (Devlin et al. 2019, appendix A.1)."""
    objective = made("mask", 256)
    tokens, known, seeds = rows(objective)
    batch = objective.batch(tokens, known, seeds)
    shown, targets, chosen = batch["inputs"]["tokens"], batch["targets"], batch["weights"] > 0
    assert objective.added == 1
    np.testing.assert_array_equal(targets, tokens[:, :-1])
    np.testing.assert_array_equal(shown[~chosen], targets[~chosen])
    assert not np.any(chosen & (targets == END))
    n = chosen.sum()
    # Four standard errors of a share.
    near = 4 * np.sqrt(0.15 * 0.85 / (targets != END).sum())
    assert abs(n / (targets != END).sum() - 0.15) < near
    hidden, kept = (shown == FIRST)[chosen].mean(), (shown == targets)[chosen].mean()
    assert abs(hidden - 0.8) < 4 * np.sqrt(0.16 / n) and abs(kept - 0.1) < 4 * np.sqrt(0.09 / n)
    replaced = shown[chosen & (shown != FIRST) & (shown != targets)]
    assert len(np.unique(replaced)) > 200


def test_spans_have_t5s_sizes_and_lose_nothing():
    """Rate 0.15 and mean length 3 of 512 tokens: the paper's and its code's 568 tokens become 512 and 114."""
    objective = made("span", 512)
    tokens, known, seeds = rows(objective, count=60)
    batch = objective.batch(tokens, known, seeds)
    source, targets, weights = batch["inputs"]["tokens"], batch["targets"], batch["weights"]
    assert (objective.window, source.shape[1], targets.shape[1]) == (568, 512, 114)
    assert np.all(weights == 1) and objective.added == 28
    np.testing.assert_array_equal(batch["inputs"]["decoder_tokens"][:, 0], END)
    np.testing.assert_array_equal(batch["inputs"]["decoder_tokens"][:, 1:], targets[:, :-1])
    spans = []
    for row in range(len(tokens)):
        assert source[row, -1] == targets[row, -1] == END
        # Putting each span back in the place of its sentinel gives the text.
        answers, current = {}, None
        for token in targets[row, :-1]:
            if token >= FIRST:
                current = answers.setdefault(int(token), [])
            else:
                current.append(int(token))
        assert list(answers) == list(range(FIRST, FIRST + 28))
        spans += [len(x) for x in answers.values()]
        text = [t for token in source[row, :-1] for t in (answers[int(token)] if token >= FIRST else [int(token)])]
        assert text == tokens[row, :-1].tolist()
    assert min(spans) == 1 and np.mean(spans) == pytest.approx(85 / 28) and len(set(spans)) > 5


def test_denoising_hides_what_it_says_and_keeps_the_order():
    """30 % in stretches of Poisson(3) (Lewis et al. 2020, section 4)."""
    objective = made("denoise", 200)
    tokens, known, seeds = rows(objective)
    batch = objective.batch(tokens, known, seeds)
    source, valid = batch["inputs"]["tokens"], batch["inputs"]["valid"]
    np.testing.assert_array_equal(batch["targets"], tokens[:, :-1])
    kept = [source[i][valid[i] & (source[i] != FIRST)] for i in range(B)]
    assert np.mean([len(k) for k in kept]) == pytest.approx(140, abs=0.1)
    masks = [(source[i][valid[i]] == FIRST).sum() for i in range(B)]
    assert np.mean(masks) == pytest.approx(60 / 3, rel=0.1)
    for i in range(20):
        text = iter(tokens[i, :-1].tolist())
        assert all(token in text for token in kept[i].tolist()), "what is left is not in the text's order"
        assert np.all(source[i][~valid[i]] == END)


def test_short_stretches_leave_no_token_without_a_place():
    """Poisson(1) draws more empty stretches than a third of the rows has hidden tokens."""
    objective = made("denoise", 128, span_length=1.0)
    batch = objective.batch(*rows(objective))
    source, valid = batch["inputs"]["tokens"], batch["inputs"]["valid"]
    assert {int((row[shown] != FIRST).sum()) for row, shown in zip(source, valid, strict=True)} == {128 - 38}


def test_what_short_stretches_lack_is_spread_over_them():
    """38 draws of Poisson(1) hide about 38 tokens; where they hide fewer no single stretch gets the rest."""
    objective = made("denoise", 128, span_length=1.0)
    tokens = np.broadcast_to(np.arange(129, dtype=np.int32), (300, 129))
    batch = objective.batch(tokens, np.ones(tokens.shape, bool), np.arange(300, dtype=np.uint64))
    long = 0
    for row, shown in zip(batch["inputs"]["tokens"], batch["inputs"]["valid"], strict=True):
        kept = row[shown].tolist()
        # Between two tokens that stay, with one mark: a stretch by itself.
        alone = [
            b - a - 1
            for a, mark, b in zip(kept, kept[1:], kept[2:], strict=False)
            if mark == FIRST and FIRST not in (a, b)
        ]
        long += max(alone) > 5
    assert long / 300 < 0.1, "a stretch of 6 or more is one in 1,700"


def test_continuing_predicts_the_second_half():
    objective = made("continue", 8)
    tokens, known, seeds = rows(objective, count=3)
    known[2, 12:] = False
    batch = objective.batch(tokens, known, seeds)
    np.testing.assert_array_equal(batch["inputs"]["tokens"], tokens[:, :8])
    np.testing.assert_array_equal(batch["targets"], tokens[:, 8:16])
    np.testing.assert_array_equal(batch["inputs"]["decoder_tokens"][:, 1:], tokens[:, 8:15])
    np.testing.assert_array_equal(batch["weights"], [[1] * 8, [1] * 8, [1] * 4 + [0] * 4])


@pytest.mark.parametrize("name", ["mask", "span", "denoise"])
def test_a_row_that_is_cut_off_weighs_nothing(name):
    objective = made(name)
    tokens, known, seeds = rows(objective, count=4)
    known[1, -2:] = False
    weights = objective.batch(tokens, known, seeds)["weights"]
    assert weights[1].sum() == 0 and weights[[0, 2, 3]].sum() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="next", mask_rate=0.2), "data.mask_rate=0.2: the objective 'next' has none. Leave it out."),
        (dict(name="mask", span_length=2.0), "data.span_length=2.0: the objective 'mask' has none. Leave it out."),
        (dict(name="mask", mask_rate=1.0), "data.mask_rate=1.0: a share of the tokens in (0, 1)."),
        (dict(name="span", span_length=0.5), "data.span_length=0.5: must be at least 1."),
        (dict(name="prefix_lm", seq_len=1), "data.seq_len=1: the objective 'prefix_lm' needs at least 2."),
        (dict(name="span", seq_len=2), "data.seq_len=2: the objective 'span' needs at least 3."),
    ],
)
def test_errors(fields, message):
    with says(message):
        made(**fields)


def wordpieces():
    """Every other piece goes on with the word before."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*marks, *(f"##{i}" if i % 2 else f"w{i}" for i in range(200)), ".", "!"]
    engine = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    engine.add_special_tokens(marks)
    engine.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return JsonTokenizer(engine.to_str())


def test_words_are_hidden_as_wholes():
    codec = wordpieces()
    objective = make("mask", 256, codec, mask_rate=None, span_length=None, mask_unit="word")
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 207, (B, 257)).astype(np.int32)
    batch = objective.batch(tokens, np.ones(tokens.shape, bool), np.arange(B, dtype=np.uint64))
    chosen = batch["weights"] > 0
    goes_on = np.array([p.startswith("##") for p in codec.pieces()])[tokens[:, :-1]]
    # Inside a word, all or none; from word to word, the rate.
    np.testing.assert_array_equal(chosen[:, 1:][goes_on[:, 1:]], chosen[:, :-1][goes_on[:, 1:]])
    words = chosen[~goes_on]
    assert abs(words.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / words.size)
    assert not np.array_equal(chosen, made_of_tokens(codec, tokens))


def made_of_tokens(codec, tokens):
    plain = make("mask", 256, codec, mask_rate=None, span_length=None)
    return plain.batch(tokens, np.ones(tokens.shape, bool), np.arange(B, dtype=np.uint64))["weights"] > 0


TEXT = """# Of naïve hippopotamuses

## The second heading
beta\ngamma (foreseeably) said: "hippopotamuses", and \u201cno\u201d. It's 1851\u2014or $2? e\u0301tude of caf\u00e9s \u65e5\u672c\u8a9e snake_case
\U0001f600 smile. The gamma, the beta;the hippopotamuses foreseeably\n\n### The third heading\n"""
# What is written over a letter belongs to it.
WORD = re.compile("(?:[^\\W_]\u0301?)+|[^\\w\\s]|_")


def begins_by_the_text(codec, text):
    """A piece begins a word unless the text before it is in the same word, or in the same character."""
    offsets = codec.offsets_batch([text])[0].tolist()
    inside = {at for word in WORD.finditer(text) for at in range(word.start() + 1, word.end())}
    ends = [0, *(end for _, end in offsets[:-1])]
    return [at not in inside and (i == 0 or at >= ends[i]) for i, (at, _) in enumerate(offsets)]


def learnt(kind):
    """A vocabulary so small that most words are of several pieces, and most characters beyond ASCII of several bytes."""
    texts = [TEXT, "## of the\n### of the\n" * 50, " gamma the" * 20]
    if kind == "bytes":
        return TOKENIZER
    return train_tokenizer(kind, {"bpe": 290, "wordpiece": 110, "unigram": 68}[kind], texts)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "bytes"])
def test_words_are_those_of_the_text(kind):
    codec = learnt(kind)
    pieces, ids = codec.pieces(), codec.encode_batch([TEXT])[0]
    assert kind == "bytes" or any(piece.startswith("##") for piece in pieces)
    if kind == "bpe":
        assert "##" in pieces and "\u00e6\u0139\u00a5" not in pieces
    # Where a row begins is a word's beginning, whatever stands before it.
    for cut in (0, 1, 5):
        found = word_parts(pieces).begin(np.stack([ids[cut:], ids[cut:]]))
        want = [True, *begins_by_the_text(codec, TEXT)[cut + 1 :]]
        assert found.tolist() == [want, want]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_words_of_a_text_are_hidden_as_wholes(kind):
    codec = learnt(kind)
    ids = codec.encode_batch([TEXT])[0]
    tokens, seeds = np.tile(ids, (B, 1)), np.arange(B, dtype=np.uint64)
    words = np.cumsum(begins_by_the_text(codec, TEXT))[:-1]
    assert words[-1] < 0.8 * len(words)
    split = {}
    for unit in ("word", "token"):
        objective = make("mask", len(ids) - 1, codec, mask_rate=None, span_length=None, mask_unit=unit)
        chosen = objective.batch(tokens, np.ones(tokens.shape, bool), seeds)["weights"] > 0
        inside = [chosen[:, words == word] for word in range(1, words[-1] + 1)]
        split[unit] = sum(np.sum(x.any(axis=1) & ~x.all(axis=1)) for x in inside)
        shares = np.mean([x.mean() for x in inside])
        assert abs(shares - 0.15) < 4 * np.sqrt(0.15 * 0.85 / (B * words[-1]))
    assert split["word"] == 0 < split["token"]


@pytest.mark.shared_data
def test_gpt2s_words(shared_data):
    """Its vocabulary has six pieces of hashes and 33,134 that begin with a space."""
    folder = shared_data / "tokenizers" / "gpt2"
    vocab = json.loads(gzip.decompress((folder / "vocab.json.gz").read_bytes()))
    lines = gzip.decompress((folder / "merges.txt.gz").read_bytes()).decode().splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    engine = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec = JsonTokenizer(engine.to_str())
    found = word_parts(codec.pieces()).begin(codec.encode_batch([TEXT])[0][None])[0]
    assert found.tolist() == begins_by_the_text(codec, TEXT)
    wanted = [codec.token_id(piece) for piece in ("\u0120(", "fore", "see", "ably", "\u010a", "gam", "ma")]
    assert word_parts(codec.pieces()).begin(np.array([wanted]))[0].tolist() == [1, 1, 0, 0, 1, 1, 0]


def test_where_words_begin():
    def begins(pieces, row):
        return word_parts(pieces).begin(np.array([[pieces.index(piece) for piece in row]]))[0].astype(int).tolist()

    assert begins(["##a", "b", "."], ["b", "##a", ".", "b"]) == [1, 0, 1, 1]
    spaced = ["\u0120the", "re", ",", "\u0120", "##", "####"]
    assert begins(spaced, ["re", "re", ",", "re", "\u0120", "re", "\u0120the"]) == [1, 0, 1, 1, 1, 1, 1]
    # Bytes of one character, and of another that is no letter.
    pieces = ["\u2581the", "re", "<0xC3>", "<0xA9>", "<0xE2>", "<0x80>", "<0x9C>"]
    row = ["re", "<0xC3>", "<0xA9>", "re", "<0xE2>", "<0x80>", "<0x9C>", "re"]
    assert begins(pieces, row) == [1, 0, 0, 0, 1, 0, 0, 1]
    with says("data.mask_unit='word': this tokenizer does not say where words begin."):
        word_parts(["a", "b"])


# By hand: the sentences of three documents.
DIALOGUES = [
    ["The whale rose.", "\u201cWhere is he?\u201d", "asked the captain.", "Where (and how?)", "he said...", "\u2018Now!\u2019",
     "Why?!", "\u00abNo.\u00bb", "Yes.", "The end"],
    ['"There!"', '"He is there."', "They left (the captain too.)", "[Why?]", "He said 'so.'", "The end."],
    ["One is here.", "The other one isn't!", "Neither."],
]  # fmt: skip


def glued(text):
    return "".join(text.split())


@pytest.mark.parametrize(
    ("kind", "size"), [("bpe", 270), ("bpe", 350), ("wordpiece", 110), ("unigram", 50), ("bytes", 257)]
)
def test_sentences_end_with_what_closes_them_and_stay_in_their_documents(kind, size):
    texts = [" ".join(sentences) for sentences in DIALOGUES]
    codec = TOKENIZER if kind == "bytes" else train_tokenizer(kind, size, [*texts, 'so." so?" so.)'])
    assert size != 350 or {'."', '?"'} <= set(codec.pieces())
    end, parts = codec.end_id, [[glued(sentence) for sentence in sentences] for sentences in DIALOGUES]
    row = np.array([i for ids in codec.encode_batch(texts) for i in (*ids, end)][:-1], np.int32)
    objective = make("denoise", len(row), codec, mask_rate=None, span_length=None, shuffle_sentences=1.0)
    orders = set()
    for seed in range(20):
        found = objective.permuted(row, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.flatnonzero(found == end), np.flatnonzero(row == end))
        documents = [glued(codec.decode(ids)) for ids in np.split(found, np.flatnonzero(found == end))]
        for document, sentences in zip(documents, parts, strict=True):
            assert "".join(sorted(sentences, key=document.index)) == document
        orders.add(tuple(documents))
    assert len(orders) == 20


def test_what_ends_a_sentence():
    """A mark that has a space before it opens; WordPiece does not say, so that the second of two straight quotes does."""
    bytes_, pieces = ["\u0120a", '\u0120"', "\u0120!"], ["##a", "##b", "##c", "##d"]
    both = ["a", ".", '"', '."', ").", "?", "x.", ".x", ")", '",', "'"]
    for vocabulary, sentences in (
        (bytes_, [["a", ".", '"'], ["\u0120a", "?"], ["x"]]),
        (bytes_, [["a", '."'], ["\u0120a", "?"]]),
        (bytes_, [["a", ")."], ["\u0120a", "x."]]),
        (bytes_, [["a", ".x", "a"]]),
        (bytes_, [["a", "\u0120!"], ['\u0120"', "a", "?"]]),
        (bytes_, [["a", ".", ")", '"'], ["a"]]),
        (bytes_, [["a", ".", ".", "?"], ["a"]]),
        (bytes_, [["a", "."], ['",', "a"]]),
        (pieces, [["a", ".", '"'], ['"', "a", "?", "'", '"'], ["a"]]),
    ):
        known = [*vocabulary, *both, "x"]
        end = len(known)
        objective = Denoise(9, end, end, end, end, 0.3, 3.0, 1.0, spelled(known))
        row = np.array([known.index(piece) for piece in itertools.chain(*sentences)])
        found = {tuple(objective.permuted(row, np.random.default_rng(seed)).tolist()) for seed in range(100)}
        orders = itertools.permutations(sentences)
        assert found == {tuple(known.index(piece) for piece in itertools.chain(*order)) for order in orders}, sentences
    with says("data.shuffle_sentences: this tokenizer has no piece for a full stop."):
        spelled(["a", ".x"])


def test_data_of_other_words_has_another_name():
    """Runs with WordPiece's words go on; those with others, and with permuted sentences, were of other data."""
    for kind, same in (("wordpiece", True), ("bpe", False)):
        codec = learnt(kind)
        whole, moved = (
            make("denoise", 32, codec, mask_rate=None, span_length=None, shuffle_sentences=share)
            for share in (0.0, 0.5)
        )
        assert fingerprint(whole) == repr(whole) and fingerprint(moved).startswith(repr(moved) + " ")
        plain, words = (
            make("mask", 32, codec, mask_rate=None, span_length=None, mask_unit=unit) for unit in ("token", "word")
        )
        assert fingerprint(plain) == repr(plain) and (fingerprint(words) == repr(words)) == same


def test_sentences_are_permuted_and_nothing_is_lost():
    codec = wordpieces()
    objective = make("denoise", 64, codec, mask_rate=1e-9, span_length=None, shuffle_sentences=1.0)
    rng, stop = np.random.default_rng(0), codec.token_id(".")
    tokens = rng.integers(5, 205, (B, 65)).astype(np.int32)
    tokens[:, 9:64:10] = stop
    batch = objective.batch(tokens, np.ones(tokens.shape, bool), np.arange(B, dtype=np.uint64))
    np.testing.assert_array_equal(batch["targets"], tokens[:, :-1])
    hidden, moved = codec.token_id("[MASK]"), []
    for row in range(B):
        source = batch["inputs"]["tokens"][row][batch["inputs"]["valid"][row]]
        places = np.flatnonzero(source == hidden)
        if len(places) > 1:
            continue  # a stretch of nothing has pushed a token out at the end
        # One token is behind the mask; whichever it is, the others are sentences in some order.
        sentences = np.split(tokens[row, :-1], np.flatnonzero(tokens[row, :-1] == stop) + 1)
        orders = itertools.permutations(range(len(sentences))) if row < 3 else []
        every = [np.delete(np.concatenate([sentences[i] for i in order]), places) for order in orders]
        assert not every or any(np.array_equal(one, np.delete(source, places)) for one in every)
        left = np.bincount(tokens[row, :-1], minlength=300) - np.bincount(np.delete(source, places), minlength=300)
        assert left.min() == 0 and left.sum() == 1
        moved.append(not np.array_equal(np.delete(source, places), np.delete(tokens[row, :-1], places)))
    assert len(moved) > B / 2
    # One order of 7! is the old one.
    assert np.mean(moved) > 0.98
    some = make("denoise", 64, codec, mask_rate=1e-9, span_length=None, shuffle_sentences=0.5)
    batch = some.batch(tokens, np.ones(tokens.shape, bool), np.arange(B, dtype=np.uint64))
    # Row for row as without permuting, or with it.
    kept = [np.sum(batch["inputs"]["tokens"][row, :8] == tokens[row, :8]) >= 6 for row in range(B)]
    assert abs(np.mean(kept) - 0.5 - 0.5 / 7) < 4 * np.sqrt(0.25 / B)


def test_a_prefix_and_the_rest_are_the_window():
    objective = made("prefix")
    tokens, known, seeds = rows(objective)
    batch = objective.batch(tokens, known, seeds)
    cuts = batch["inputs"]["valid"].sum(1)
    for row in range(B):
        source = batch["inputs"]["tokens"][row, : cuts[row]]
        rest = batch["targets"][row][batch["weights"][row] > 0]
        np.testing.assert_array_equal(np.concatenate([source, rest]), tokens[row, :-1])
    # Uniform from 1 to 63.
    assert cuts.min() >= 1 and cuts.max() <= 63
    assert abs(cuts.mean() - 32) < 4 * np.sqrt(63**2 / 12 / B)


def test_a_prefix_is_not_predicted_and_what_follows_is():
    objective = made("prefix_lm")
    tokens, known, seeds = rows(objective)
    known[3, 40:] = False
    batch = objective.batch(tokens, known, seeds)
    next_ = made("next").batch(tokens, known, seeds)
    np.testing.assert_array_equal(batch["inputs"]["tokens"], next_["inputs"]["tokens"])
    np.testing.assert_array_equal(batch["targets"], next_["targets"])
    prefix = batch["inputs"]["prefix"]
    for row in range(B):
        for place in range(64):
            want = place + 1 >= prefix[row] and known[row, place + 1]
            assert batch["weights"][row, place] == want
    assert prefix.min() == 1 and prefix.max() == 63 and prefix.dtype == np.int32
    np.testing.assert_array_equal(prefix, made("prefix").batch(tokens, known, seeds)["inputs"]["valid"].sum(1))


@pytest.mark.parametrize("question", ["order", "follow"])
def test_segment_pairs_against_a_slow_version(question):
    codec = wordpieces()
    objective = make(question, 40, codec, mask_rate=0.3, span_length=None)
    window = 37
    assert objective.window == window and objective.elsewhere == (window if question == "follow" else 0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 205, (B, window + 1 + objective.elsewhere)).astype(np.int32)
    batch = objective.batch(tokens, np.ones(tokens.shape, bool), np.arange(B, dtype=np.uint64))
    shown, types = batch["inputs"]["tokens"], batch["inputs"]["token_types"]
    cuts = []
    for row in range(B):
        text, pair = batch["targets"]["tokens"][row], batch["targets"]["pair"][row]
        middle = int(np.flatnonzero(types[row])[0]) - 1
        first, second = text[1:middle], text[middle + 1 : -1]
        assert (text[0], text[middle], text[-1]) == (2, 3, 3) and len(first) + len(second) == window
        assert types[row].tolist() == [int(place > middle) for place in range(40)]
        own, other = tokens[row, :window], tokens[row, window + 1 :]
        if question == "order":
            np.testing.assert_array_equal(np.concatenate([second, first] if pair else [first, second]), own)
        else:
            cut = len(first)
            np.testing.assert_array_equal(first, own[:cut])
            np.testing.assert_array_equal(second, other[cut:] if pair else own[cut:])
        cuts.append(len(second) if question == "order" and pair else len(first))
        chosen = batch["weights"][row] > 0
        assert not chosen[[0, middle, -1]].any()
        np.testing.assert_array_equal(shown[row][~chosen], text[~chosen])
    assert abs(batch["targets"]["pair"].mean() - 0.5) < 4 * np.sqrt(0.25 / B)
    assert min(cuts) == 9 and max(cuts) == 28
    assert abs((batch["weights"] > 0).sum() / (B * window) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / (B * window))
    assert batch["inputs"]["valid"].all()
    engine = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    # RoBERTa's, whose marks say nothing of a second segment.
    engine.post_processor = RobertaProcessing(("</s>", 1), ("<s>", 0))
    with says(f"data.objective={question!r} needs a tokenizer that tells two segments apart, as BERT's do."):
        make(question, 40, JsonTokenizer(engine.to_str()), mask_rate=None, span_length=None)


LENGTHS = [3, 30, 7, 8, 200, 9, 21, 5, 40, 61, 14, 22, 23, 100]


@pytest.fixture
def documents(tmp_path):
    """Arguments of data whose words say which document they are of, and where: `4x17`. Held out are two."""

    def text(document, length):
        return " ".join(f"{document}x{i}" for i in range(length))

    for name, lengths in (("train", dict(enumerate(LENGTHS))), ("valid", {77: 60, 78: 12})):
        lines = [json.dumps({"text": text(document, length)}) + "\n" for document, length in lengths.items()]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return dict(source=f"jsonl:{tmp_path}/*.jsonl", tokenizer="words", cache_dir=str(tmp_path / "cache"), workers=1)


def segments(data, batch, row):
    """The words of a row's two segments as (document, place); checks that nothing but marks is around them."""
    end, pieces = data.tokenizer.end_id, data.tokenizer.pieces()
    tokens, valid = batch["targets"]["tokens"][row], batch["inputs"]["valid"][row]
    length = int(valid.sum())
    marks = np.flatnonzero(tokens[:length] == end)
    assert marks[0] == 0 and len(marks) == 3 and marks[-1] == length - 1 and (tokens[length:] == end).all()
    assert valid[:length].all()
    assert not batch["weights"][row][tokens == end].any()
    parts = (tokens[marks[0] + 1 : marks[1]], tokens[marks[1] + 1 : marks[2]])
    return [[tuple(map(int, pieces[i].split("x"))) for i in part] for part in parts]


def in_one_piece(words):
    """The document of words that follow each other in it."""
    assert [at for _, at in words] == list(range(words[0][1], words[0][1] + len(words)))
    assert len({document for document, _ in words}) == 1
    return words[0][0]


@pytest.mark.parametrize("question", ["order", "follow"])
@pytest.mark.parametrize("seq_len", [16, 40])
def test_segments_are_of_one_document_each(documents, question, seq_len):
    data = tokens.make(**documents, seq_len=seq_len, objective=question, batch_size=32)
    assert data.fingerprint != made_before(data, question, seq_len)
    window, pairs, found, shapes = seq_len - 3, [], [], ([], [])
    for step in range(20):
        batch = data.train.batch_at(step)
        for row in range(32):
            first, second = segments(data, batch, row)
            here, there = in_one_piece(first), in_one_piece(second)
            pair = int(batch["targets"]["pair"][row])
            if question == "order":
                assert in_one_piece(second + first if pair else first + second) == here
                size = len(first) + len(second)
            else:
                assert (here != there) == pair
                assert pair or in_one_piece(first + second) == here
                size = min(LENGTHS[here], window)
                assert size // 4 <= len(first) <= size - size // 4 and len(first) + len(second) <= size
                shape = (size, len(first), len(second))
                shapes[pair].append(shape)
            assert size == min(LENGTHS[here], window) >= 8
            pairs.append(pair)
            found.append(here)
    assert abs(np.mean(pairs) - 0.5) < 4 * np.sqrt(0.25 / len(pairs))
    # How long segments are does not say whose they are: the same lengths come as often beside strangers.
    for size, first, second in {*shapes[0], *shapes[1]}:
        counts = [one.count((size, first, second)) for one in shapes]
        assert abs(counts[0] - counts[1]) < 5 * np.sqrt(sum(counts) + 1)
    # Each document has its rows in each epoch, as many as it has windows.
    rows = {i: max(n // window, 1) for i, n in enumerate(LENGTHS) if n >= 8}
    epoch = found[: sum(rows.values())]
    assert {i: epoch.count(i) for i in set(epoch)} == rows


def made_before(data, question, seq_len):
    """The fingerprint of data whose segments ran over the ends of documents."""
    frame = Frame([data.tokenizer.end_id], [data.tokenizer.end_id], [data.tokenizer.end_id], True)
    size = data.tokenizer.vocab_size
    mask = Mask(seq_len, data.tokenizer.end_id, size, size, 0.15)
    corpus = data.fingerprint.split()[0]
    return f"{corpus} SegmentPairs(mask={mask!r}, frame={frame!r}, question={question!r}, window={seq_len - 3})"


@pytest.mark.parametrize("question", ["order", "follow"])
def test_rows_of_documents_are_functions_of_their_number(documents, question):
    data = tokens.make(**documents, seq_len=40, objective=question, batch_size=8, seed=3)
    again = tokens.make(**documents, seq_len=40, objective=question, batch_size=8, seed=3)
    held = data.evals("validation", 3)
    assert held.num_batches == 1  # a window of each
    for one, other, steps in ((data.train, again.train, (7, 0, 2)), (held, again.evals("validation", 3), (0, 1))):
        for step in steps:
            whole = one.batch_at(step)
            for rows in (slice(None), slice(1, None, 2), np.array([2, 0, 0])):
                part = other.batch_at(step, rows)
                for key in ("tokens", "valid"):
                    np.testing.assert_array_equal(part["inputs"][key], whole["inputs"][key][rows])
                np.testing.assert_array_equal(part["weights"], whole["weights"][rows])
                np.testing.assert_array_equal(part["targets"]["pair"], whole["targets"]["pair"][rows])
    batch = held.batch_at(0)
    assert (batch["weights"].sum(axis=1) > 0).tolist() == [True, True, False]
    # The windows of an epoch begin elsewhere than those of another one.
    rows = data.train.laid.training
    begins = set()
    for epoch in range(6):
        batches = [data.train.batch_at(step) for step in range(epoch * rows // 8, (epoch + 1) * rows // 8)]
        words = [segments(data, batch, row)[0] for batch in batches for row in range(8)]
        begins.add(min((at for part in words for document, at in part if document == 4), default=None))
    assert len(begins) > 2


def test_documents_that_give_no_pairs(documents, tmp_path):
    asked = dict(documents, seq_len=40, batch_size=8)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a b c d e f g h"}) + "\n")
    assert tokens.make(**asked, objective="order").train.batch_at(0)["weights"].shape == (8, 40)
    with says(
        "data.objective='follow' needs documents that do not follow each other: data.source="
        f"{documents['source']!r} has one in the split 'train'. Take 'order'."
    ):
        tokens.make(**asked, objective="follow")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a b c d e f g"}) + "\n")
    with says(
        f"data.source={documents['source']!r}: segments of one document need 8 tokens of it; none of the split 'train' has them."
    ):
        tokens.make(**asked, objective="order")


def test_a_held_out_document_alone_has_no_strangers(documents, tmp_path):
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": " ".join(f"77x{i}" for i in range(90))}) + "\n")
    asked = dict(documents, seq_len=40, batch_size=8)
    assert tokens.make(**asked, objective="order").evals("validation", 3).num_batches == 1
    with says(
        "data.objective='follow' needs documents that do not follow each other: data.source="
        f"{documents['source']!r} has one in the split 'validation'. Take 'order'."
    ):
        tokens.make(**asked, objective="follow").evals("validation", 3)


def test_a_tokenizer_that_was_trained_here_has_segments(documents):
    """Its only mark stands around them and between them; its texts have no types, as when a run is fine-tuned."""
    data = tokens.make(**dict(documents, tokenizer="wordpiece:60"), seq_len=40, objective="follow", batch_size=8)
    batch, end = data.train.batch_at(0), data.tokenizer.end_id
    assert not data.tokenizer.frame().types and set(batch["inputs"]) == {"tokens", "valid"}
    for row, valid in zip(batch["targets"]["tokens"], batch["inputs"]["valid"], strict=True):
        first, middle, last = np.flatnonzero(row[valid] == end)
        assert first == 0 and 1 < middle < last - 1 and last == valid.sum() - 1
