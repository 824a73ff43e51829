"""Rules over names of activations: what is kept is what they say, and a name that there is not is refused.

That gradients are the same is in `test_stack`.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import print_saved_residuals

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.nn import remat
from tfm_jax.nn.attention import Context
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.nn.stack import Stack
from tfm_jax.train.build import build

B, T, D, L = 2, 6, 16, 2
X = jnp.ones((B, T, D))
PLAIN = BlockSpec(width=D, heads=4, kv_heads=2, mlp="gated", bias="none")
MIXTURE = BlockSpec(width=D, heads=4, kv_heads=2, mlp="gated", bias="none", experts=4)


def kept(capsys, spec, layer_loop, policy):
    """Shapes of what the backward pass of a stack is left, and names where they have one, but for parameters.

    What is in the host's memory has that for a name.
    """
    stack = Stack(spec, L, layer_loop, policy)
    context = Context(Mask(causal=True))
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), X, context, train=False)["params"])
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    print_saved_residuals(lambda p: jnp.sum(stack.apply({"params": p}, X, context, train=False)[0] ** 2), params)
    lines = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line and "constant" not in line]
    found = [re.match(r"\w+(<host>)?\[([\d,]*)\](?: named '(.*?)')?", line).groups() for line in lines]
    return [(shape, host or name) for host, shape, name in found]


@pytest.mark.parametrize(
    ("spec", "pattern", "action", "want"),
    [
        (PLAIN, "mixed$|mlp/up", "save", {("attention/mixed", f"{B},{T},{D}"), ("mlp/up", f"{B},{T},64")}),
        (PLAIN, "mlp/up|attention/v", "offload", {("<host>", f"{B},{T},64"), ("<host>", f"{B},{T},8")}),
        # A token goes to two experts.
        (MIXTURE, "experts/", "save", {("experts/up", f"{2 * B * T},64"), ("experts/gate", f"{2 * B * T},64")}),
    ],
)  # fmt: skip
def test_exactly_what_a_rule_names_is_kept(capsys, spec, pattern, action, want):
    found = kept(capsys, spec, "loop", ((pattern, action),))
    # The stream between blocks is kept whatever the rules say.
    assert sorted((name, shape) for shape, name in found if name not in (None, "mlp/residual")) == sorted([*want] * L)


def test_scanned_layers_keep_the_same_stacked(capsys):
    full = kept(capsys, PLAIN, "scan", "full")
    found = kept(capsys, PLAIN, "scan", (("mixed$|mlp/up", "save"),))
    more = [shape for shape, _ in found]
    for shape, _ in full:
        more.remove(shape)
    assert sorted(more) == [f"{L},{B},{T},16", f"{L},{B},{T},64"]


def test_the_first_rule_that_matches_decides():
    decide = remat.policy((["query", "offload"], ["attention", "save"]))
    primitive = jax.make_jaxpr(lambda x: remat.checkpoint_name(x, "x"))(1.0).eqns[0].primitive
    found = {name: decide(primitive, name=name) for name in ("attention/query", "attention/key", "mlp/up")}
    actions = remat.Offloadable(src="device", dst="pinned_host"), remat.Saveable, remat.Recompute
    assert tuple(found.values()) == actions


NAMES = ("attention/key, attention/mixed, attention/out, attention/query, attention/residual, attention/value, mlp/down,"
         " mlp/residual, mlp/up")  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("(('atention', 'save'),)", f"model.remat: the pattern 'atention' matches no activation. Names here: {NAMES}."),
        ("(('mlp', 'keep'),)", "model.remat: 'keep' of ('mlp', 'keep') does not exist. Valid: offload, save."),
        ("('mlp',)", "model.remat: 'mlp' is not a pair (regex, 'save' or 'offload')."),
        ("(('(', 'save'),)", "model.remat: '(' is not a regular expression: missing ), unterminated subpattern at position 0."),
    ],
)  # fmt: skip
def test_rules_that_are_none(make_config, given, message):
    with says(message):
        build(make_config({"model.remat": given}))


def test_a_config_takes_rules(make_config):
    config = make_config({"model.remat": "(('mlp/', 'save'), ('attention/mixed', 'save'))", "model.layer_loop": "scan"})
    assert config["model"]["remat"] == [["mlp/", "save"], ["attention/mixed", "save"]]
    assert hash(build(config).model) is not None
    with pytest.raises(UserError, match=r"^config: model.remat='ful' .* Did you mean 'full'\?$"):
        make_config({"model.remat": "ful"})


def test_a_device_without_its_hosts_memory(make_config, monkeypatch):
    monkeypatch.setattr("tfm_jax.train.check.has_host_memory", lambda device: False)
    with says("model.remat: 'offload': a program for cpu has no access to its host's memory here. Use 'save'."):
        build(make_config({"model.remat": "(('mlp', 'offload'),)"}))
