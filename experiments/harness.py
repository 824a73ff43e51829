"""Evaluate a causal language model on tasks of EleutherAI's `lm-eval`, or on your own ones in its format.

Needs `pip install 'tfm_jax[harness]'`. The figures go to RUN/harness_STEP_TASKS.json too, with what else was asked behind the tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax.errors import UserError, nearest
from tfm_jax.units import cut

EXAMPLES = """\
  python -m experiments.harness --run runs/gpt2 --tasks lambada_openai hellaswag --limit 100
  python -m experiments.harness --run runs/gpt_stdlib --tasks my_task --include_path my_tasks"""
# Positions of a model that has no limit of its own.
LENGTH = 2048
# Bytes of a file's name that tasks may take.
LONGEST = 129


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--run", type=Path, required=True, help="run directory")
    made.add_argument("--step", type=int, help="checkpoint to use; the newest by default")
    cli.add_average(made)
    made.add_argument("--tasks", nargs="+", required=True, help="names of tasks")
    made.add_argument("--include_path", type=Path, help="folder of tasks in YAML; then lm-eval's own are not looked at")
    made.add_argument("--num_fewshot", type=int, help="examples before each question; as the task says by default")
    made.add_argument("--limit", type=int, help="questions a task; all by default")
    made.add_argument("--batch_size", type=int, default=8)
    flags, _ = cli.parse(made, argv)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("The harness needs lm-eval: pip install 'tfm_jax[harness]'.") from None
    averaged = cli.averaged(flags)
    if flags.include_path is not None and not flags.include_path.is_dir():
        raise UserError(f"--include_path={flags.include_path}: there is no such folder.")
    manager = TaskManager(include_path=flags.include_path, include_defaults=flags.include_path is None)
    for task in flags.tasks:
        if not ("*" in task or Path(task).is_file() or task in manager.all_tasks):
            raise UserError(f"--tasks={task}: there is no such task.{nearest(task, manager.all_tasks)}")
    cli.setup()
    from experiments.generate import Loaded
    from tfm_jax.config import to_json
    from tfm_jax.evals.harness import Harness
    from tfm_jax.files import write_atomic

    run = Loaded(flags.run, flags.step, **averaged)
    if run.answers or not run.generates:
        raise UserError(f"{flags.run} is no causal language model, which is what the harness asks.")
    model = Harness(
        run.model,
        run.params,
        run.tokenizer,
        begins=lambda text: run.inputs(text, 1)[0],
        end_id=run.end_id,
        max_len=getattr(run.model, "max_len", None) or LENGTH,
        prefix=run.prefix,
        batch_size=flags.batch_size,
    )
    try:
        found = simple_evaluate(
            model,
            tasks=flags.tasks,
            num_fewshot=flags.num_fewshot,
            limit=flags.limit,
            task_manager=manager,
            log_samples=False,
        )
    except ConnectionError as error:
        raise UserError(
            f"--tasks={' '.join(flags.tasks)}: lm-eval downloads its tasks' data, and cannot: {error}"
        ) from None
    except (KeyError, ValueError) as error:
        raise UserError(f"--tasks={' '.join(flags.tasks)}: {error}") from None
    assert found is not None
    results = {
        f"{task}/{name.partition(',')[0]}": value
        for task, figures in found["results"].items()
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    asked = {name: getattr(flags, name) for name in ("average", "decay", "num_fewshot", "limit")}
    record = {"step": run.step, **asked, **results}
    print(cli.table([(name, f"{value:.4f}") for name, value in sorted(results.items())]))
    changed = {name: value for name, value in asked.items() if value != made.get_default(name)}
    write_atomic(flags.run / file_name(run.step, flags.tasks, changed), to_json(record))
    if flags.json:
        cli.print_json(record)
    return 0


def file_name(step: int, tasks: Sequence[str], asked: Mapping[str, Any]) -> str:
    """Of the figures of tasks asked in a way of their own; many tasks are shortened to a hash of their names."""
    name = cut(re.sub(r"[^\w.+-]", "_", "+".join(sorted(tasks))), LONGEST)
    return f"harness_{step}_{name}{''.join(f'_{key}={value}' for key, value in asked.items())}.json"


if __name__ == "__main__":
    cli.run(main)
