"""24 trials that Optuna draws, two thirds of which are stopped at each rung (ASHA): at steps 25, 75, 225.

python -m experiments.sweep --config=configs/gpt_stdlib.py --sweep=configs/sweeps/asha.py --workdir=sweeps/asha
"""

from tfm_jax.sweep.space import Study, log_uniform


def sweep():
    return Study(
        space={"optim.lr": log_uniform(5e-4, 0.2)},
        fixed={"train.eval_every": 25},
        metric="eval/validation/loss",
        trials=24,
        pruner="asha",
    )
