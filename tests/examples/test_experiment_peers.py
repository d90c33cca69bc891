"""Optimizers of other packages in the registry of the experiments."""

import sys

import jax
import jax.numpy as jnp
import optax
import pytest


PEERS = ("psgd_kron", "prism")


@pytest.mark.parametrize("name", PEERS)
def test_a_package_that_is_missing_is_named_with_its_extra(
    load, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setitem(sys.modules, "rollfast", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        load("probe").main(["--optimizers", "sgd", name])
    message = capsys.readouterr().err
    assert "package rollfast" in message
    assert "'.[peers]'" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PEERS)
def test_peers_descend(load, name):
    pytest.importorskip("rollfast")
    optimizers = load("lab.optimizers")
    tx = optimizers.make(optimizers.parse(name), lambda step: 0.05)
    params = {"inner": jnp.ones((4, 6)), "head": jnp.ones((6, 2)), "b": jnp.ones(3)}
    value = lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(value)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 150)
    assert value(after) < 0.1 * value(params)


def test_a_line_search_has_one_learning_rate(load, tmp_path):
    args = ["--optimizers", "lbfgs", "--learning-rates", "grid", "--output"]
    command = load("lab.command")
    parsed = command.options("").parse_args([*args, str(tmp_path)])
    workload = load("lab.regression").workload(load("lab.regression").digits(), 64)
    assert command.check(parsed, workload).rates == [[1.0]]
