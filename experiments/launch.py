"""Train on several hosts: local processes, Slurm, Kubernetes or a TPU pod; what follows -- goes to experiments.train."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from experiments import cli
from tfm_jax import config as configs
from tfm_jax import names
from tfm_jax.errors import UserError
from tfm_jax.launch.job import job

EXAMPLES = """\
  python -m experiments.launch --backend local --processes 2 --devices 4 -- --config=configs/gpt_stdlib.py:smoke --workdir=runs/two
  python -m experiments.launch --backend slurm --nodes 4 --time 24:00:00 -- --config=configs/gpt_stdlib.py --workdir=runs/four
  python -m experiments.launch --backend k8s --image me/tfm_jax --volume runs:/runs --hosts 4 --dry_run \\
    -- --config=configs/gpt_stdlib.py --workdir=/runs/gpt
  python -m experiments.launch --backend tpu --name my-pod --zone us-east5-a --dry_run \\
    -- --config=configs/gpt_stdlib.py --workdir=/mnt/runs/gpt
  python -m experiments.launch --backend slurm --help"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, train = arguments[:cut], arguments[cut + 1 :]
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--backend")
    name = first.parse_known_args(own)[0].backend
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument(
        "--backend", required=True, help="local, slurm, k8s, tpu, or my_lab.cluster:launch; with --help, its own flags"
    )
    launch = None
    if name is not None:
        launch = names.resolve(name, package="tfm_jax.launch", attribute="launch", setting="--backend")
        add_flags(made.add_argument_group(f"--backend {name}", _summary(launch)), launch)
    flags, _ = cli.parse(made, own)
    assert launch is not None
    if not train:
        raise UserError(
            "Nothing to train: write -- and then the flags of experiments.train, --config=... --workdir=..."
        )
    _check(train)
    settings = {key: value for key, value in vars(flags).items() if key not in ("backend", "json")}
    code: int = launch(job(train), **settings)
    if flags.json:
        cli.print_json({"exit_code": code})
    return code


def _check(train: Sequence[str]) -> None:
    """Find here what would otherwise be found on every host: a wrong flag of the config."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    made.add_argument("--config")
    made.add_argument("--workdir")
    made.add_argument("--profile")
    made.add_argument("--json", action="store_true")
    flags, overrides = cli.parse(made, train)
    if flags.config is None:
        raise UserError("--config is not among the training flags.")
    configs.resolve(configs.load(flags.config), overrides)


def add_flags(group: argparse._ArgumentGroup, launch: Callable[..., int], without: Sequence[str] = ()) -> list[str]:
    """A flag for each keyword argument of a backend; its docstring says what it is. Returns their names."""
    added = []
    hints, doc = typing.get_type_hints(launch), inspect.getdoc(launch) or ""
    for name, parameter in inspect.signature(launch).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name in without:
            continue
        added.append(name)
        hint, required = hints[name], parameter.default is inspect.Parameter.empty
        if isinstance(hint, types.UnionType):
            (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
        found = re.search(rf"^ +{name}: (.+(?:\n {{4,}}.+)*)", doc, re.MULTILINE)
        if found is None:
            raise TypeError(f"{launch.__module__}: the docstring says nothing of {name}.")
        said = " ".join(found[1].split()).replace("%", "%%")
        options: dict[str, Any] = {"required": required, "help": said, "default": parameter.default, "metavar": "X"}
        if not required and parameter.default not in (None, (), False):
            options["help"] += " (%(default)s)"
        if hint is bool:
            del options["metavar"]
            options["action"] = "store_true"
        elif typing.get_origin(hint) is typing.Literal:
            options |= {"choices": typing.get_args(hint), "metavar": None}
        elif typing.get_origin(hint) is Sequence:
            options |= {"action": "append", "default": list(parameter.default)}
        else:
            options["type"] = hint
        group.add_argument(f"--{name}", **options)
    return added


def _summary(launch: Callable[..., int]) -> str:
    """What a backend's docstring says before its arguments, in lines as argparse would not make them."""
    return textwrap.fill(" ".join((inspect.getdoc(launch) or "").partition("Args:")[0].split()), 100)


if __name__ == "__main__":
    cli.run(main)
