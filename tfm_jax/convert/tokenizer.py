"""The tokenizer of a Hugging Face model folder, whichever files it is kept in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from tfm_jax.data.tokenizers import END_MARK, JSON_FILE, JsonTokenizer, read_json_tokenizer, read_sentencepiece
from tfm_jax.data.types import Tokenizer

KEPT = "hf"  # folder beside the saved tokenizer, with the files as they came
FILES = (
    JSON_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model", "source.spm", "target.spm",
)  # fmt: skip


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """From `tokenizer.json`, a SentencePiece model, `vocab.txt` or `vocab.json` with `merges.txt`; None without any."""
    if (folder / JSON_FILE).is_file():
        return read_json_tokenizer(folder / JSON_FILE)
    for name in ("tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            return read_sentencepiece(folder / name)
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text()) if settings.is_file() else {}
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


def keep_files(folder: Path, tokenizer_folder: Path) -> None:
    """Copy a model folder's tokenizer files beside the saved tokenizer, so that an export gives them back."""
    kept = tokenizer_folder / KEPT
    for name in FILES:
        if (folder / name).is_file():
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, kept / name)


def write_files(tokenizer_folder: Path, folder: Path) -> None:
    """The files that `transformers` reads: those that came with the model, else what its own format can say."""
    kept = tokenizer_folder / KEPT
    if kept.is_dir():
        for path in sorted(kept.iterdir()):
            shutil.copyfile(path, folder / path.name)
        return
    for path in sorted(tokenizer_folder.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    if (folder / JSON_FILE).is_file():
        own = read_json_tokenizer(folder / JSON_FILE)
        vocab = json.loads(own.json)
        marks = {token["id"]: token["content"] for token in vocab.get("added_tokens", [])}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": marks.get(own.end_id, END_MARK)}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
