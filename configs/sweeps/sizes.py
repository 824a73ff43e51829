"""Twelve runs for a scaling law: four widths, each trained for three lengths with its learning rate's whole decay.

python -m experiments.sweep --config=configs/gpt_mup.py --sweep=configs/sweeps/sizes.py --workdir=sweeps/sizes --parallel=2
python -m experiments.scaling 'sweeps/sizes/*' --metric=eval/validation/loss --budget=1e13 --to=runs/law
"""

from tfm_jax.sweep.space import grid


def sweep():
    return grid({"model.width": [64, 96, 128, 192], "train.steps": [200, 400, 800]})
