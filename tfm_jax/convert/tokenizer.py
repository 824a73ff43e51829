"""The tokenizer of a Hugging Face model folder, whichever files it is kept in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tfm_jax.convert.huggingface import read_json
from tfm_jax.data.tokenizers import END_MARK, JSON_FILE, JsonTokenizer, read_json_tokenizer, read_sentencepiece
from tfm_jax.data.types import Tokenizer

KEPT = "hf"  # folder in a run, with the files as they came
FILES = (
    JSON_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model", "source.spm", "target.spm",
)  # fmt: skip
# Not of the tokenizer, but given back with it.
OTHERS = ("preprocessor_config.json", "generation_config.json")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """From `tokenizer.json`, a SentencePiece model, `vocab.txt` or `vocab.json` with `merges.txt`; None without any."""
    if (folder / JSON_FILE).is_file():
        return read_json_tokenizer(folder / JSON_FILE)
    config = _read(folder / "tokenizer_config.json")
    for name in ("tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            found = read_sentencepiece(folder / name)
            t5 = "T5" in config.get("tokenizer_class", "") or _read(folder / "config.json").get("model_type") == "t5"
            # Its class adds them behind the pieces, the first one last.
            marks = [f"<extra_id_{i}>" for i in range(config.get("extra_ids", 100) if t5 else 0)][::-1]
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
        bpe = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        special = [m for m in (END_MARK, "<s>", "<pad>", "</s>", "<unk>", "<mask>") if bpe.token_to_id(m) is not None]
        bpe.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in special])
        return JsonTokenizer(bpe.to_str(), str(folder / "vocab.json"))
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


def write_files(run: Path, folder: Path, part: str = "") -> None:
    """The files that `transformers` reads: those that came with the model, else what its own format can say."""
    kept = run / KEPT / part
    if kept.is_dir():
        for name in (*FILES, *OTHERS):
            if (kept / name).is_file():
                shutil.copyfile(kept / name, folder / name)
    if (run / "tokenizer").is_dir() and not any((folder / name).is_file() for name in FILES):
        for path in sorted((run / "tokenizer").iterdir()):
            shutil.copyfile(path, folder / path.name)
        if (folder / JSON_FILE).is_file():
            (folder / "tokenizer_config.json").write_text(json.dumps(_settings(folder / JSON_FILE), indent=2))


# What `transformers` calls marks, and the marks that stand for each.
_ROLES = {
    "unk_token": ("[UNK]", "<unk>", "\N{REPLACEMENT CHARACTER}"),
    "pad_token": ("[PAD]", "<pad>"),
    "mask_token": ("[MASK]", "<mask>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
}


def _settings(path: Path) -> dict[str, str]:
    """A `tokenizer_config.json` for a tokenizer that was made here: a document begins and ends with one mark."""
    own = read_json_tokenizer(path)
    added = json.loads(own.json).get("added_tokens", [])
    end = next((token["content"] for token in added if token["id"] == own.end_id), END_MARK)
    roles = {
        role: next((mark for mark in marks if own.token_id(mark) is not None), None) for role, marks in _ROLES.items()
    }
    found = {role: mark for role, mark in roles.items() if mark is not None}
    # Without a mark for padding its tokenizer refuses to make batches.
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end} | found
