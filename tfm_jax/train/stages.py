"""Whether a model can be a pipeline on a mesh, and which."""

from __future__ import annotations

import dataclasses
import math

from tfm_jax.config import Config
from tfm_jax.errors import UserError
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.parallel.sharding import BATCH_AXES, Layout
from tfm_jax.sections import model_class
from tfm_jax.train.settings import Train

# Huang et al. 2019, section 2.3: with four microbatches for each stage waiting hardly shows.
FOR_EACH_STAGE = 4


def pipeline_of(config: Config, layout: Layout) -> Pipeline | None:
    """The pipeline over the mesh's axis `stage`; None where that is 1.

    Raises:
      UserError: a model that has none, layers that the stages do not divide, rows that the microbatches do not.
    """
    stages = layout.mesh.shape["stage"]
    if stages == 1:
        return None
    model = config["model"]
    here = f"mesh.stage={stages}: model.name={model['name']!r}"
    if "pipeline" not in {field.name for field in dataclasses.fields(model_class(model["name"]))}:
        raise UserError(f"{here} is not made of layers that can be on stages. Use mesh.fsdp or mesh.tensor.")
    if model["layer_loop"] != "scan":
        raise UserError(f"{here} has layers with parameters of their own. Set model.layer_loop='scan'.")
    for name in ("layers", "encoder_layers", "decoder_layers"):
        if model.get(name, 0) % stages:
            near = [n for n in range(2, model[name] + 1) if model[name] % n == 0]
            nearest = f" What does: {', '.join(map(str, near))}."
            raise UserError(f"mesh.stage={stages} does not divide model.{name}={model[name]}.{nearest}")
    for name, section in config["evals"].items():
        if section["name"] == "generation":
            raise UserError(
                f"{here} cannot decode on stages, as evals.{name} wants. Leave it out, and evaluate the run."
            )
    batch, accum = config["data"].get("batch_size"), Train(**config["train"]).accum
    ways = math.prod(layout.mesh.shape[axis] for axis in BATCH_AXES)
    rows = None if batch is None else batch // accum // ways
    if layout.microbatches is None:
        most = FOR_EACH_STAGE * stages
        # Without a batch size each batch is cut into as many as it allows.
        found = [] if rows is None else [m for m in range(stages, most + 1, stages) if rows % m == 0]
        return Pipeline(stages, max(found, default=most))
    if rows is not None and rows % layout.microbatches:
        raise UserError(
            f"mesh.microbatches={layout.microbatches} does not divide the {rows} rows that each pipeline has of"
            f" data.batch_size={batch} (train.accum={accum}, {ways} pipelines)."
        )
    return Pipeline(stages, layout.microbatches)
