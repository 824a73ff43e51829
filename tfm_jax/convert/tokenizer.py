"""The tokenizer of a Hugging Face model folder, whichever files it is kept in."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import RobertaProcessing

from tfm_jax.convert.huggingface import read_json
from tfm_jax.data.tokenizers import (
    END_MARK,
    JSON_FILE,
    SENTENCEPIECE_FILE,
    JsonTokenizer,
    read_json_tokenizer,
    read_sentencepiece,
)
from tfm_jax.data.types import Tokenizer
from tfm_jax.errors import UserError

log = logging.getLogger(__name__)

KEPT = "hf"  # folder in a run, with the files as they came
FILES = (
    JSON_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model", "source.spm", "target.spm",
)  # fmt: skip
# Not of the tokenizer, but given back with it.
GENERATION = "generation_config.json"
OTHERS = ("preprocessor_config.json", GENERATION)
SENTINEL = re.compile(r"^<extra_id_\d+>$")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """From `tokenizer.json`, a SentencePiece model, `vocab.txt` or `vocab.json` with `merges.txt`; None without any.

    Raises:
      UserError: there are files, but they cannot be read.
    """
    try:
        return _read_tokenizer(folder)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare ones
        raise UserError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error}).") from None


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    if (folder / JSON_FILE).is_file():
        return read_json_tokenizer(folder / JSON_FILE)
    config = _read(folder / "tokenizer_config.json")
    named = str(config.get("tokenizer_class") or "") + str(_read(folder / "config.json").get("model_type") or "")
    for name in ("tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            found = read_sentencepiece(folder / name)
            if "albert" in named.lower() and config.get("do_lower_case", True):
                log.warning("%s: lower case is not in the file; use a tokenizer.json. Left out.", folder / name)
                return None
            # T5's class adds them behind the pieces, the first one last.
            count = config.get("extra_ids", 100) if "t5" in named.lower() else 0
            marks = [f"<extra_id_{i}>" for i in range(count)][::-1]
            return found.with_marks([mark for mark in marks if found.token_id(mark) is None])
    if (folder / "vocab.txt").is_file():
        vocab = str(folder / "vocab.txt")
        lower = bool(config.get("do_lower_case", True))
        accents, chinese = config.get("strip_accents"), bool(config.get("tokenize_chinese_chars", True))
        made = tokenizers.BertWordPieceTokenizer(
            vocab, lowercase=lower, strip_accents=accents, handle_chinese_chars=chinese
        )
        return JsonTokenizer(made.to_str(), vocab)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        prefix = bool(config.get("add_prefix_space", False))
        bpe = tokenizers.ByteLevelBPETokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), add_prefix_space=prefix
        )
        special = [m for m in (END_MARK, "<s>", "<pad>", "</s>", "<unk>", "<mask>") if bpe.token_to_id(m) is not None]
        bpe.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in special])
        engine = tokenizers.Tokenizer.from_str(bpe.to_str())
        if {"<s>", "</s>"} <= {*special}:
            # The marks that RoBERTa's class, and those made after it, put around a text.
            ids = engine.get_vocab(with_added_tokens=True)
            engine.post_processor = RobertaProcessing(
                ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=prefix
            )
        return JsonTokenizer(engine.to_str(), str(folder / "vocab.json"))
    return None


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def keep_files(folder: Path, run: Path, part: str = "") -> None:
    """Copy the files of a model folder that are neither weights nor config into a run, for an export to give back."""
    kept = run / KEPT / part
    for name in (*FILES, *OTHERS):
        if (folder / part / name).is_file():
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / part / name, kept / name)


def write_files(run: Path, folder: Path, part: str = "", *, added: Sequence[str] = ()) -> None:
    """The files that `transformers` reads: those that came with the model, else what its own format can say.

    Args:
      added: names of the ids behind the tokenizer's own that the run's objective has taken, see `objectives.marks`.
    """
    kept = run / KEPT / part
    if kept.is_dir():
        for name in (*FILES, *OTHERS):
            if (kept / name).is_file():
                shutil.copyfile(kept / name, folder / name)
    saved = run / "tokenizer"
    if any((folder / name).is_file() for name in FILES):
        return
    if (saved / JSON_FILE).is_file():
        engine = tokenizers.Tokenizer.from_file(str(saved / JSON_FILE))
        first = max(engine.get_vocab(with_added_tokens=True).values()) + 1
        engine.add_special_tokens([*added])
        assert [engine.token_to_id(name) for name in added] == list(range(first, first + len(added)))
        engine.save(str(folder / JSON_FILE))
        (folder / "tokenizer_config.json").write_text(json.dumps(_settings(folder / JSON_FILE), indent=2))
    elif (saved / SENTENCEPIECE_FILE).is_file():
        found = read_sentencepiece(saved / SENTENCEPIECE_FILE)
        count = sum(1 for i in range(1000) if found.token_id(f"<extra_id_{i}>") is not None)
        if count:
            # T5's class adds them itself.
            (folder / "spiece.model").write_bytes(found.without(SENTINEL).proto)
            config = {"tokenizer_class": "T5Tokenizer", "extra_ids": count}
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        else:
            shutil.copyfile(saved / SENTENCEPIECE_FILE, folder / SENTENCEPIECE_FILE)


# What `transformers` calls marks, and the marks that stand for each.
_ROLES = {
    "unk_token": ("[UNK]", "<unk>", "\N{REPLACEMENT CHARACTER}"),
    "pad_token": ("[PAD]", "<pad>"),
    "mask_token": ("[MASK]", "<mask>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
}


def pad_id(own: Tokenizer) -> int:
    """Of the mark that an export pads with: the tokenizer's, else the end of a document."""
    found = (own.token_id(mark) for mark in _ROLES["pad_token"])
    return next((i for i in found if i is not None), own.end_id)


def _settings(path: Path) -> dict[str, Any]:
    """A `tokenizer_config.json` for a tokenizer that was made here: a document begins and ends with one mark."""
    own = read_json_tokenizer(path)
    added = json.loads(own.json).get("added_tokens", [])
    end = next((token["content"] for token in added if token["id"] == own.end_id), END_MARK)
    roles = {
        role: next((mark for mark in marks if own.token_id(mark) is not None), None) for role, marks in _ROLES.items()
    }
    found: dict[str, Any] = {role: mark for role, mark in roles.items() if mark is not None}
    if own.frame().types:
        found["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    # Without a mark for padding its tokenizer refuses to make batches.
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end} | found
