"""Continue a prompt with a trained run, or give an encoder-decoder's answer to it; the text streams as it is made."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from experiments.convert import read_origin
from tfm_jax.errors import UserError

EXAMPLES = """\
  python -m experiments.generate --run runs/gpt_stdlib --prompt 'def main('
  python -m experiments.generate --run runs/gpt_stdlib --prompt 'class ' --temperature 0
  python -m experiments.generate --run runs/gpt_stdlib --prompt 'import ' --top_k 40 --top_p 0.95 --seed 1
  python -m experiments.generate --run runs/t5 --prompt 'translate English to German: That is good.' --beams 5"""
# What says how to draw, and what how to search.
DRAWN, SEARCHED = ("temperature", "top_k", "top_p", "seed"), ("length_penalty",)


def main(argv: Sequence[str] | None = None) -> int:
    from tfm_jax.decode.sample import Sampling

    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--run", type=Path, required=True, help="run directory")
    made.add_argument("--step", type=int, help="checkpoint to use; the newest by default")
    cli.add_average(made)
    made.add_argument("--prompt", default="", help="text to continue; by default a new document")
    made.add_argument("--max_new", type=int, help="tokens to make at most; 100, or what the model has room for")
    made.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    made.add_argument("--top_k", type=int, default=0, help="draw from this many likeliest tokens; 0 for all")
    made.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest tokens with this probability")
    made.add_argument("--beams", type=int, default=0, help="beam search with this many beams; 0 draws instead")
    made.add_argument("--length_penalty", type=float, default=1.0, help="of beam search: above 0 favours longer texts")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--no_stream", action="store_true", help="print the text when it is whole")
    flags, _ = cli.parse(made, argv)
    _check_search(made, flags)
    cli.setup()
    run = Loaded(flags.run, flags.step, **cli.averaged(flags))
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    start = time.perf_counter()
    out = None if flags.no_stream or flags.beams else sys.stdout
    if flags.beams:
        text, tokens = run.likeliest(flags.prompt, flags.beams, flags.length_penalty, flags.max_new)
    else:
        text, tokens = run.drawn(flags.prompt, sampling, flags.max_new, flags.seed, out)
    seconds = time.perf_counter() - start
    print("" if out is not None else text if run.answers else flags.prompt + text, flush=True)
    if flags.json:
        cli.print_json({"step": run.step, "prompt": flags.prompt, "text": text, "tokens": tokens, "seconds": seconds})
    return 0


def _check_search(made: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Beam search draws nothing, and drawing has no beams: what the other is told would do nothing."""
    idle, how = (DRAWN, "--beams draws no token") if flags.beams else (SEARCHED, "is of beam search: give --beams too")
    if name := cli.given(made, flags, idle):
        raise UserError(f"--{name}={getattr(flags, name)}: {how}.")


class Loaded:
    """A run's model, parameters and tokenizer; its data set is not opened."""

    def __init__(self, path: Path, step: int | None = None, average: int = 1, decay: float = 1.0) -> None:
        from tfm_jax.data.tokenizers import load_tokenizer
        from tfm_jax.sections import build_model
        from tfm_jax.train import rundir
        from tfm_jax.train.restore import load_params

        config = rundir.read_config(path)
        if not (path / "tokenizer").is_dir():
            raise UserError(f"{path} has no tokenizer: it was not trained on text.")
        self.tokenizer = load_tokenizer(path / "tokenizer")
        self.model = build_model(config["model"])
        self.generates = hasattr(self.model, "init_caches")
        # An encoder-decoder answers a prompt, other models that generate continue it.
        self.answers = "decoder_tokens" in inspect.signature(type(self.model).__call__).parameters
        self.data = config["data"]
        self.prefix = self.data.get("objective") == "prefix_lm"
        self.params, self.step = load_params(path, step, average=average, decay=decay)
        self.origin = _settings(path)
        ends = (self.origin or {}).get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else [i for i in ends or [] if isinstance(i, int)]
        self.end_id = ends or [self.tokenizer.end_id]

    def inputs(self, prompt: str, max_new: int | None) -> tuple[list[int], list[list[int]] | None, int]:
        """The first tokens of what is made, what an encoder reads, and how many tokens are made at most."""
        if not self.generates:
            family = type(self.model).__module__.rpartition(".")[2]
            raise UserError(
                f"A model of the family {family!r} continues no text: it has no init_caches. `python -m experiments.predict` has"
                " what it says of texts."
            )
        ids = [int(i) for i in self.tokenizer.encode_batch([prompt])[0]] if prompt else []
        if self.tokenizer.unk_id is not None and self.tokenizer.unk_id in ids:
            raise UserError(f"The prompt {prompt!r} has characters that the run's tokenizer has never seen.")
        sources = None
        if self.answers:
            if not ids:
                raise UserError("An encoder-decoder answers a text: give one with --prompt.")
            sources = [self._source(ids)]
            start = self.data.get("decoder_start")
            ids = [self.tokenizer.end_id if start is None else start]
            forced = (self.origin or {}).get("forced_bos_token_id")
            ids += [] if forced is None else [forced]
        elif self.origin is None:
            # Documents start after an end mark, so the prompt does too.
            ids = [self.tokenizer.end_id, *ids]
        else:
            # Another library's model begins as its own tokenizer says.
            ids = self.tokenizer.prompt(prompt) or [self.origin.get("bos_token_id") or self.tokenizer.end_id]
        if max_new is None:
            limit = getattr(self.model, "max_len", None)
            max_new = 100 if limit is None else max(1, min(100, limit - len(ids)))
        return ids, sources, max_new

    def attended(self, text: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """The model's inputs of one row for a text, with the answer to it where there is one, and their tokens by name."""
        if not self.generates:
            frame, own = self.tokenizer.frame(), self.tokenizer.encode_batch([text])[0]
            rows = {"tokens": [*frame.before, *map(int, own), *frame.after]}
        else:
            ids, sources, _ = self.inputs(text, 1)
            rows = {"tokens": ids}
            if sources is not None:
                limit = min(40, (getattr(self.model, "max_len", None) or 64) - len(ids))
                rows = {"tokens": sources[0], "decoder_tokens": [*ids, *self._found(text, 4, 1.0, limit)]}
        limit = getattr(self.model, "max_len", None)
        if limit is not None and max(map(len, rows.values())) > limit:
            raise UserError(f"The text has {max(map(len, rows.values()))} tokens, and model.max_len={limit}.")
        arrays = {name: np.array([row], np.int32) for name, row in rows.items()}
        pieces = self.tokenizer.pieces()
        return arrays, {name: [pieces[i] if i < len(pieces) else str(i) for i in row] for name, row in rows.items()}

    def _source(self, ids: list[int]) -> list[int]:
        """With the marks that the model has seen around a source."""
        if self.origin is not None or self.data["name"] == "pairs":
            frame = self.tokenizer.frame()
            return [*frame.before, *ids, *frame.after]
        return [*ids, self.tokenizer.end_id] if self.data.get("objective") == "span" else ids

    def likeliest(self, prompt: str, beams: int, length_penalty: float, max_new: int | None) -> tuple[str, int]:
        """The best text that beam search finds, and its number of tokens."""
        found = self._found(prompt, beams, length_penalty, max_new)
        return self.tokenizer.decode(found), len(found)

    def _found(self, prompt: str, beams: int, length_penalty: float, max_new: int | None) -> list[int]:
        from tfm_jax.decode.beam import beam_search

        ids, sources, max_new = self.inputs(prompt, max_new)
        (found,) = beam_search(
            self.model,
            self.params,
            [ids],
            sources=sources,
            prefix=self.prefix,
            beams=beams,
            max_new=max_new,
            length_penalty=length_penalty,
            end_id=self.end_id,
            allowed=self.tokenizer.vocab_size,
        )
        return list(found[0].tokens)

    def drawn(self, prompt: str, sampling: Any, max_new: int | None, seed: int, out: Any = None) -> tuple[str, int]:
        """A text and its number of tokens, written to `out`, a prompt that it continues first, as it comes."""
        from tfm_jax.data.tokenizers import TextStream
        from tfm_jax.decode.sample import generate

        ids, sources, max_new = self.inputs(prompt, max_new)
        stream, pending = TextStream(self.tokenizer), "" if self.answers else prompt

        def on_token(new: np.ndarray) -> None:
            nonlocal pending
            if out is not None and new[0] >= 0:
                # The prompt comes with the first token, behind all messages and errors.
                print(pending + stream.push(int(new[0])), end="", file=out, flush=True)
                pending = ""

        made = generate(
            self.model,
            self.params,
            [ids],
            sources=sources,
            prefix=self.prefix,
            max_new=max_new,
            sampling=sampling,
            end_id=self.end_id,
            allowed=self.tokenizer.vocab_size,
            seed=seed,
            on_token=on_token if out is not None else None,
        )[0]
        if out is not None:
            print(pending + stream.flush(), end="", file=out, flush=True)
        return self.tokenizer.decode(made), len(made)


def _settings(path: Path) -> dict[str, Any] | None:
    """What an imported model says of generation; None for a run that was trained here."""
    from tfm_jax.convert.tokenizer import GENERATION, KEPT

    origin = read_origin(path)
    if origin is None or "" not in origin["parts"]:
        return None
    own = path / KEPT / GENERATION
    return {**origin["parts"][""]["config"], **(json.loads(own.read_text()) if own.is_file() else {})}


def sample(path: Path) -> tuple[str | None, str | None]:
    """For the end of a training run, a short sample, where it makes text from nothing, and what to ask it, where it makes any."""
    from tfm_jax.decode.sample import Sampling

    try:
        run = Loaded(path)
    except UserError:
        return None, None
    if not run.generates:
        return None, None
    if run.answers:
        return None, "--prompt 'a text' --beams 4"
    text, _ = run.drawn("", Sampling(0.8, 40), None, 0)
    # A model that has learnt little may say anything, terminal control codes too.
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text, "--prompt 'def '"


if __name__ == "__main__":
    cli.run(main)
