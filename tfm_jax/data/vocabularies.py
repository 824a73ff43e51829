"""Tokenizers made from a spec string such as `bpe:4096`; those that learn, learn from the train split only."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from tfm_jax.data.locks import locked
from tfm_jax.data.tokenizers import (
    END_MARK,
    JsonTokenizer,
    load_tokenizer,
    read_json_tokenizer,
    read_sentencepiece,
)
from tfm_jax.data.types import Source, Tokenizer
from tfm_jax.errors import UserError, nearest

log = logging.getLogger(__name__)

KINDS = (
    "bytes",
    "chars",
    "words",
    "bpe:N",
    "wordpiece:N",
    "unigram:N",
    "file:PATH",
    "sentencepiece:PATH",
    "run:FOLDER",
)
TRAINING_VERSION = 1
UNIGRAM_SAMPLE = 2_000_000
"""Characters that unigram training looks at: it is 50 times slower than BPE (100 s for 11 MB on two cores)."""


def open_tokenizer(spec: str, source: Source, cache_dir: Path) -> Tokenizer:
    """The tokenizer that `spec` names: read from its file, or trained on `source`'s train split once and cached."""
    kind, _, argument = spec.partition(":")
    if spec == "missing":
        raise UserError(
            "This model came without a tokenizer that can be read. Give one: --config.data.tokenizer=file:PATH, or"
            " sentencepiece:PATH."
        )
    valid = {k.partition(":")[0]: k for k in KINDS}
    if kind not in valid:
        raise UserError(f"data.tokenizer: unknown kind {kind!r} in {spec!r}.{nearest(kind, valid)}")
    if bool(argument) != (":" in valid[kind]):
        raise UserError(f"data.tokenizer: {spec!r} should look like {valid[kind]!r}.")
    if kind == "file":
        return read_json_tokenizer(Path(argument).expanduser())
    if kind == "sentencepiece":
        return read_sentencepiece(Path(argument).expanduser())
    if kind == "run":
        return load_tokenizer(Path(argument).expanduser() / "tokenizer")
    if kind == "bytes":
        return byte_tokenizer()
    size = _vocabulary_size(spec, argument) if argument else 0
    key = hashlib.sha256(f"{TRAINING_VERSION} {source.fingerprint} {spec}".encode()).hexdigest()[:32]
    folder = cache_dir / "tokenizers" / key
    with locked(folder):
        if not folder.exists():
            log.info("Training the tokenizer %s on the train split of %s.", spec, source.name)
            trained = train_tokenizer(kind, size, train_texts(source))
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            trained.save(partial)
            partial.rename(folder)
    return load_tokenizer(folder)


def train_texts(source: Source) -> Iterator[str]:
    for piece in source.splits["train"]:
        for document in piece.documents():
            yield document.text


def _vocabulary_size(spec: str, argument: str) -> int:
    if not argument.isdecimal():
        raise UserError(f"data.tokenizer: the vocabulary size in {spec!r} is not a whole number.")
    smallest = 257 if spec.startswith("bpe") else 3
    if int(argument) < smallest:
        raise UserError(f"data.tokenizer: the vocabulary of {spec!r} is too small; it needs at least {smallest}.")
    return int(argument)


def train_tokenizer(kind: str, size: int, texts: Iterable[str]) -> JsonTokenizer:
    """Train a `chars`, `words`, `bpe`, `wordpiece` or `unigram` tokenizer.

    The same texts give the same tokenizer, except for unigram, whose library adds floats in a random order.
    """
    train = {"chars": _chars, "words": _words, "bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}[kind]
    tokenizer = JsonTokenizer(train(size, texts).to_str(), f"the trained {kind} tokenizer")
    if size and tokenizer.vocab_size > size:
        raise UserError(
            f"data.tokenizer: a {kind} vocabulary of {size} is too small for this text; its characters and the marks "
            f"alone take {tokenizer.vocab_size}."
        )
    if tokenizer.vocab_size < size:
        log.warning("The text gave %s a vocabulary of %d, not %d.", kind, tokenizer.vocab_size, size)
    return tokenizer


def byte_tokenizer() -> JsonTokenizer:
    """UTF-8 bytes: the id of a byte is its value, 256 is the end mark."""
    # ByteLevel writes a printable Latin-1 byte as itself and the others, in order, as the characters from 256 on.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(c for c in alphabet if ord(c) >= 256))
    vocab = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
    engine = Engine(models.BPE(vocab=vocab, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([END_MARK])
    return JsonTokenizer(engine.to_str(), "bytes")


def _chars(size: int, texts: Iterable[str]) -> Engine:
    # U+FFFD is the unknown character, so that what was lost shows when it is decoded.
    unknown = "\ufffd"
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    characters = [*sorted(seen - {unknown}), unknown]
    vocab = {character: index for index, character in enumerate(characters)}
    engine = Engine(models.BPE(vocab=vocab, merges=[], unk_token=unknown))
    engine.decoder = decoders.Fuse()
    engine.add_special_tokens([END_MARK])
    return engine


def _words(size: int, texts: Iterable[str]) -> Engine:
    """What stands between spaces, and each end of a line; a word that was never seen is `<unk>`."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    seen = {"\n"}
    for text in texts:
        seen.update(text.split())
    vocab = {word: index for index, word in enumerate(["<unk>", *sorted(seen - {"<unk>", END_MARK})])}
    engine = Engine(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    engine.pre_tokenizer = splitter
    engine.add_special_tokens([END_MARK])
    return engine


def _bpe(size: int, texts: Iterable[str]) -> Engine:
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_MARK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return engine


def _wordpiece(size: int, texts: Iterable[str]) -> Engine:
    """BERT's: splits at spaces and punctuation, so decoding gives words with single spaces between them."""
    texts = list(texts)
    splitter = pre_tokenizers.BertPreTokenizer()
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    # The trainer numbers "##x" in the order of a randomly seeded hash map and breaks ties by number. Handed over as
    # sorted special tokens they have fixed numbers; the tokenizer is then put together without them being special.
    inside = [f"##{c}" for c in sorted(characters) if not c.isspace()]
    marks = [END_MARK, "[UNK]"]
    learner = Engine(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(size, len(inside) + 2), special_tokens=[*marks, *inside], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    engine = Engine(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    engine.pre_tokenizer = splitter
    engine.decoder = decoders.WordPiece(cleanup=False)
    engine.add_special_tokens(marks)
    return engine


def _unigram(size: int, texts: Iterable[str]) -> Engine:
    texts = list(texts)
    step = max(1, -(-sum(map(len, texts)) // UNIGRAM_SAMPLE))
    sample = [text[:UNIGRAM_SAMPLE] for text in texts[::step]]
    if step > 1:
        log.info("Unigram training looks at every %d-th document, %d in all.", step, len(sample))
    engine = Engine(models.Unigram())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    engine.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 1, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    engine.train_from_iterator(sample, trainer)
    # Not one of the model's own pieces: those are found in plain text too.
    engine.add_special_tokens([END_MARK])
    return engine
