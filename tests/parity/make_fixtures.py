"""Write what PyTorch's `transformers` computes with tiny random models: `python -m tests.parity.make_fixtures`.

Needs the extra `parity`. The files are committed, so that the tests that read them need no PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .weights import LAYERS, LENGTH, VOCAB, WIDTH

FOLDER = Path(__file__).parent / "fixtures"
SEED, GRAIN, STRIDE = 11, np.float32(1 / 64), 5
Arrays = dict[str, np.ndarray]


def _model(family: str) -> Any:
    import transformers

    if family == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=4, bos_token_id=0,
                eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
            )
        )  # fmt: skip
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, max_position_embeddings=LENGTH, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5,
            bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, attn_implementation="eager",
        )
    )  # fmt: skip


def compute(family: str) -> Arrays:
    """`weight/NAME` and `gradient/NAME` for every parameter, `tokens` (B, T), `logits`, and the mean `loss`.

    Weights are drawn by numpy, whose bit generators are fixed for good, and are multiples of `GRAIN` that fit in a
    byte. Every one is random, biases and norms too.
    """
    import torch

    rng = np.random.default_rng(SEED)
    model = _model(family).float().eval()
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            norm = name.endswith("norm.weight") or ("ln_" in name and name.endswith("weight"))
            value = rng.normal(1.0 if norm else 0.0, 0.1 if p.ndim == 1 else 0.2, p.shape)
            p.copy_(torch.from_numpy(np.clip(np.round(value / GRAIN), -127, 127) * GRAIN))
    tokens = rng.integers(0, VOCAB, (2, LENGTH - 3))
    logits = model(torch.from_numpy(tokens)).logits
    targets = torch.from_numpy(tokens[:, 1:].reshape(-1))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), targets)
    loss.backward()
    out = {"tokens": tokens.astype(np.int32), "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    for name, p in model.named_parameters():
        out[f"weight/{name}"], out[f"gradient/{name}"] = p.detach().numpy(), p.grad.numpy()
    return out


def save(path: Path, arrays: Arrays) -> None:
    """Weights in a byte each; of a matrix's gradient every fifth element, which reaches all its rows and columns."""
    out = {}
    for name, x in arrays.items():
        if name.startswith("weight/"):
            x = (x / GRAIN).astype(np.int8)
        elif name.startswith("gradient/") and x.ndim > 1:
            x = x.reshape(-1)[::STRIDE]
        out[name] = x
    np.savez_compressed(path, **out)


def load(path: Path) -> Arrays:
    """What `save` wrote, in the original shapes; gradients that it left out are NaN."""
    with np.load(path) as stored:
        out = {name: stored[name] for name in stored}
    for name in [name for name in out if name.startswith("weight/")]:
        weight = out[name] = out[name].astype(np.float32) * GRAIN
        if weight.ndim > 1:
            gradient = np.full(weight.shape, np.nan, np.float32)
            key = name.replace("weight/", "gradient/", 1)
            gradient.reshape(-1)[::STRIDE] = out[key]
            out[key] = gradient
    return out


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for family in ("gpt2", "llama"):
        save(FOLDER / f"{family}.npz", compute(family))


if __name__ == "__main__":
    main()
