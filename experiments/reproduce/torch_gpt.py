"""A GPT in PyTorch with the shape of ours and nanoGPT's way of training, to be timed beside it. Needs `parity`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal


def step(
    layers: int, width: int, heads: int, length: int, batch: int, vocab: int, device: Literal["cpu", "cuda"] = "cpu"
) -> Callable[[], float]:
    """A function that runs one training step (fused attention, clipping, AdamW) and returns its loss.

    On a GPU it is compiled and its products are bfloat16.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x: Any) -> Any:
            parts = self.qkv(self.norms[0](x)).split(width, dim=2)
            q, k, v = (part.view(batch, length, heads, width // heads).transpose(1, 2) for part in parts)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
            return x + self.down(functional.gelu(self.up(self.norms[1](x))))

    class Model(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width, bias=False)
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, ids: Any, targets: Any) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.norm(x), self.tokens.weight)
            return functional.cross_entropy(logits.view(-1, vocab), targets.view(-1))

    torch.manual_seed(0)
    model: Any = Model().to(device)
    gpu = device == "cuda"
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=gpu)
    if gpu:
        torch.set_float32_matmul_precision("high")
        model = torch.compile(model)
    ids, targets = (torch.randint(vocab, (batch, length), device=device) for _ in range(2))

    def run() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return run
