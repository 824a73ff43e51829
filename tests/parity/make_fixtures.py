"""Write what PyTorch's `transformers` computes with tiny random models: `python -m tests.parity.make_fixtures`.

Needs the extra `parity`. The files are committed, so that the tests that read them need no PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.weights import LAYERS, LENGTH, VOCAB, WIDTH

FOLDER = Path(__file__).parent / "fixtures"
SEED = 11


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


def compute(family: str) -> dict[str, np.ndarray]:
    """`weight/NAME` and `gradient/NAME` for every parameter, `tokens` (B, T), `logits`, and the mean `loss`.

    Weights are drawn by numpy, whose bit generators are fixed for good, and rounded to 1/256 so that they compress and
    are exact in half precision. Every one is random, biases and norms too.
    """
    import torch

    rng = np.random.default_rng(SEED)
    model = _model(family).float().eval()
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            spread = 0.1 if p.ndim == 1 else 0.2
            value = rng.normal(1.0 if "norm" in name or ".ln_" in name and "weight" in name else 0.0, spread, p.shape)
            p.copy_(torch.from_numpy(np.round(value * 256) / 256))
    tokens = rng.integers(0, VOCAB, (2, LENGTH - 3))
    logits = model(torch.from_numpy(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), torch.from_numpy(tokens[:, 1:].reshape(-1)))
    loss.backward()
    out = {"tokens": tokens.astype(np.int32), "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    for name, p in model.named_parameters():
        out[f"weight/{name}"] = p.detach().numpy().astype(np.float16)
        assert np.array_equal(out[f"weight/{name}"].astype(np.float32), p.detach().numpy()), name
        out[f"gradient/{name}"] = p.grad.numpy()
    return out


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for family in ("gpt2", "llama"):
        np.savez_compressed(FOLDER / f"{family}.npz", **compute(family))


if __name__ == "__main__":
    main()
