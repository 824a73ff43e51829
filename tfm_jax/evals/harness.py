"""Causal language models as `lm-eval`'s harness asks them (extra: harness): log-likelihood, rolling, generate-until.

B batch, T length (padded).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from tfm_jax.data.types import Tokenizer
from tfm_jax.decode.sample import Sampling, generate
from tfm_jax.errors import UserError

log = logging.getLogger(__name__)
# Tokens that a task may have made where it does not say how many; the harness' own number.
MAX_NEW = 256
NEW_KEYS = {"until", "max_gen_toks", "temperature", "top_k", "top_p", "do_sample"}


class Harness(TemplateLM):  # type: ignore[misc]
    """A model, its parameters and tokenizer.

    Args:
      begins: from a text to the ids that the model is given for it, with the mark that a document begins with.
      end_id: the ids that end a document; the first one stands before a text that is scored from its first token.
      max_len: positions that the model has.
      prefix: the model has learnt with `data.objective=prefix_lm`: a context's tokens see each other both ways.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokenizer: Tokenizer,
        *,
        begins: Callable[[str], list[int]],
        end_id: Sequence[int],
        max_len: int,
        prefix: bool = False,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self._model, self._params, self._text = model, params, tokenizer
        self._begins, self._ends, self._rows = begins, list(end_id), batch_size
        self.max_length, self._prefix = max_len, prefix
        self._score = jax.jit(self._scored)

    @property
    def eot_token_id(self) -> int:
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        return self._begins("")[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return [int(i) for i in self._text.encode_batch([string])[0]]
        return self._begins(string)

    def _scored(
        self, params: Any, tokens: jax.Array, targets: jax.Array, prefix: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The log-likelihood of each target (B, T) float32 nats, and whether it is the likeliest; `prefix` (B,) is how many
        tokens a context has."""
        more = {"prefix": prefix} if self._prefix else {}
        logits = self._model.apply({"params": params}, tokens, train=False, **more)["logits"].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation behind its context, of which the last `max_length` tokens are seen."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Rows of like length together, and lengths of a power of two: few shapes, little padding.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self._rows):
            places = order[start : start + self._rows]
            rows = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in places]
            for i in places:
                if len(requests[i][2]) > self.max_length:
                    raise UserError(
                        f"A continuation has {len(requests[i][2])} tokens, and the model {self.max_length} positions."
                    )
            width = min(1 << (max(len(row) - 1 for row in rows) - 1).bit_length(), self.max_length)
            tokens, targets = np.zeros((2, self._rows, width), np.int32)
            context = np.zeros(self._rows, np.int32)
            for row, (i, ids) in enumerate(zip(places, rows, strict=True)):
                tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
                context[row] = len(ids) - len(requests[i][2])
            likelihood, greedy = jax.device_get(self._score(self._params, tokens, targets, context))
            for row, (i, ids) in enumerate(zip(places, rows, strict=True)):
                part = slice(len(ids) - 1 - len(requests[i][2]), len(ids) - 1)
                out[i] = float(likelihood[row, part].sum(dtype=np.float64)), bool(greedy[row, part].all())
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once with as much before it as the harness' windows have."""
        parts, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, predicted in map(utils.make_disjoint_window, windows):
                parts.append((None, context, predicted))
                owners.append(owner)
        out = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            out[owner] += likelihood
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest text behind each context up to the first of its stops; drawn where a task says so.

        Where the model has too few positions for both, an answer has those that its context leaves, but at least a quarter of
        all, or what the task asks for if that is less; then the context loses its beginning, as in lm-eval's own models.

        Raises:
          UserError: a setting of generation that is not known here.
        """
        out = [""] * len(requests)
        prompts, cut = list[list[int]](), 0
        alike: dict[tuple[str, int], list[int]] = {}
        for i, request in enumerate(requests):
            whole, asked = self._begins(request.args[0]), int(request.args[1].get("max_gen_toks", MAX_NEW))
            new = self._room(len(whole), asked)
            prompts.append(whole[-(self.max_length - new) :])
            cut += len(whole) > len(prompts[i])
            alike.setdefault((repr(sorted(request.args[1].items())), new), []).append(i)
        if cut:
            log.warning(
                "%d of %d contexts are cut at their beginning: with an answer they are longer than the model's %d positions.",
                cut,
                len(requests),
                self.max_length,
            )
        for (_, new), places in alike.items():
            sampling, stops = self._settings(requests[places[0]].args[1])
            for start in range(0, len(places), self._rows):
                batch = places[start : start + self._rows]
                made = generate(
                    self._model,
                    self._params,
                    [prompts[i] for i in batch],
                    prefix=self._prefix,
                    max_new=new,
                    sampling=sampling,
                    end_id=self._ends,
                    allowed=self._text.vocab_size,
                    # The same question asked again is to be answered anew.
                    seed=batch[0],
                )
                for i, ids in zip(batch, made, strict=True):
                    text = self._text.decode(ids)
                    out[i] = text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
        return out

    def _room(self, size: int, asked: int) -> int:
        """How many tokens an answer to a context of `size` may have."""
        if size + asked <= self.max_length:
            return asked
        # In eighths: each number is a program of its own.
        part = max(1, self.max_length // 8)
        return min(asked, max((self.max_length - size) // part * part, 2 * part))

    def _settings(self, asked: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
        if unknown := sorted(set(asked) - NEW_KEYS):
            raise UserError(f"A task asks for generation with {', '.join(unknown)}, which is not known here.")
        until = asked.get("until") or []
        temperature = float(asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0))
        sampling = Sampling(
            temperature if asked.get("do_sample", temperature > 0) else 0.0,
            int(asked.get("top_k", 0)),
            float(asked.get("top_p", 1.0)),
        )
        return sampling, [until] if isinstance(until, str) else [stop for stop in until if stop]
