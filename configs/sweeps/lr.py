"""Eight learning rates with two seeds each, for any config of one data set.

python -m experiments.sweep --config=configs/gpt_stdlib.py --sweep=configs/sweeps/lr.py --workdir=sweeps/lr --parallel=2
"""

from tfm_jax.sweep.space import grid, product, seeds


def sweep():
    return product(grid({"optim.lr": [1e-3 * 2**i for i in range(8)]}), seeds(2))
