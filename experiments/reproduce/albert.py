"""The ALBERT inside the package `rxnmapper`, imported: masked-token logits beside the reference's.

Needs the extra `parity` (its weights are an old PyTorch file, and the reference is run beside). Unzip the wheel; the model is in
`rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k`. Writes `results/albert.json`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import cli
from experiments.convert import imported
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError

EXAMPLES = "  python -m experiments.reproduce.albert --model path/to/albert_heads_8_uspto_all_1310k"
ROWS, LENGTH, MASKED = 16, 96, 0.15


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--model", type=Path, required=True, help="folder with config.json and pytorch_model.bin")
    made.add_argument("--workdir", type=Path, default=Path("runs/albert"), help="where the imported run goes")
    flags, _ = cli.parse(made, argv)
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise UserError("This comparison needs PyTorch and transformers: pip install 'tfm_jax[parity]'.")
    cli.setup()
    import jax
    import torch
    import transformers

    from tfm_jax.sections import build_model
    from tfm_jax.train import rundir
    from tfm_jax.train.restore import load_params

    imported(flags.model, flags.workdir)
    model = build_model(rundir.read_config(flags.workdir)["model"])
    params, _ = load_params(flags.workdir)
    reference = transformers.AlbertForMaskedLM.from_pretrained(flags.model).eval()
    vocabulary = (flags.model / "vocab.txt").read_text().split("\n")
    random = np.random.default_rng(0)
    tokens = random.integers(20, reference.config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    masked = random.random(tokens.shape) < MASKED
    tokens[masked] = vocabulary.index("[MASK]")
    lengths = random.integers(LENGTH // 3, LENGTH + 1, ROWS)
    valid = np.arange(LENGTH)[None] < lengths[:, None]
    ours = jax.jit(lambda p: model.apply({"params": p}, tokens, valid=valid)["logits"])(params)
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(valid).long()
        ).logits.numpy()
    shown = masked & valid
    worst = float(np.max(np.abs(np.asarray(ours)[shown] - theirs[shown])))
    agree = float(np.mean(np.argmax(np.asarray(ours)[shown], -1) == np.argmax(theirs[shown], -1)))
    figures = {"largest_difference": worst, "same_prediction": agree, "masked_tokens": int(shown.sum())}
    write_result("albert", figures, config=flags.model.name, seed=0)
    print(f"{shown.sum()} masked tokens: logits differ by at most {worst:.1e}; {100 * agree:.1f} % same prediction")
    if flags.json:
        cli.print_json(figures)
    return 0 if worst <= 1e-4 else 1


if __name__ == "__main__":
    cli.run(main)
