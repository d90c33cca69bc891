"""The experiments run, on tiny settings, and what they write can be relied on."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


def run(load, command, folder, *args, optimizers=("adamw_b95",), steps=2, seeds=1):
    """Run a command and return its results."""
    load(command).main(
        [*args, "--optimizers", *optimizers, "--steps", str(steps), "--seeds",
         str(seeds), "--output", str(folder)]
    )  # fmt: skip
    return list(json.loads((folder / f"{command}.json").read_text()).values())


@pytest.fixture
def short_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("What is written here is read again. " * 40)
    return path


TINY = ("--layers", "1", "--width", "8", "--heads", "2")
TEXT = (*TINY, "--context", "8", "--windows", "4", "--batch-size", "4")


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("probe", ()),
        ("probe", ("--random", "20")),
        ("images", ("--model", "cnn1d")),
        ("vit", (*TINY, "--patch", "4")),
        ("text", TEXT),
        ("finetune", ("--model", "cnn1d", "--base-steps", "2")),
        ("finetune", ("--data", "text", "--base-steps", "2", *TEXT)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)
def test_every_command_trains_and_writes(load, tmp_path, command, args):
    (result,) = run(load, command, tmp_path, *args)
    assert result["config"]["optimizer"] == "adamw_b95"
    assert np.isfinite(result["loss"])
    assert 0 <= result["accuracy"] <= 1
    assert result["curve"]["step"] == [1, 2]
    assert result["curve"]["loss"][-1] == result["loss"]
    assert result["seconds"] > 0
    # Two moments, and counts of the optimizer and of the schedule.
    assert result["bytes_per_parameter"] == pytest.approx(
        8 + 8 / result["parameters"], abs=1e-3
    )


@pytest.mark.slow
def test_every_optimizer_trains_with_its_settings(load, tmp_path):
    specs = [
        *("adamw_b999", "sgd:weight_decay=1e-4", "muon", "ggt", "low_rank_mfac:rank=1"),
        "sparse_mfac:damping=1e-3,window_size=4,value_dtype=bfloat16,clip_gradient=1",
        'sparse_ggt:{"window_size": 4, "metric": {"decay": 0.9}, "clip_update": 10}',
        "low_rank_ggt:window_size=4,metric=true,error_feedback=false",
    ]
    results = run(load, "probe", tmp_path, optimizers=specs, steps=10)
    assert all(result["loss"] < np.log(10) for result in results)
    bytes_of = {r["config"]["optimizer"]: r["bytes_per_parameter"] for r in results}
    assert bytes_of["sgd"] < bytes_of["adamw_b999"] < bytes_of["ggt"]


def test_training_is_gradient_descent_on_the_batches_of_the_seed(load, tmp_path):
    rate, steps = 0.5, 4
    (result,) = run(
        load, "probe", tmp_path, "--learning-rates", str(rate), "--warmup", "0",
        "--schedule", "linear", steps=steps, optimizers=["sgd:momentum=0"],
    )  # fmt: skip
    data = load("lab.pictures").digits()
    flat = lambda images: images.reshape(len(images), -1).astype(np.float64) / 255
    x, y = flat(data.train[0]), data.train[1]
    order = np.random.default_rng(0).permutation(len(x))
    weights, bias = np.zeros((64, 10)), np.zeros(10)

    def probabilities(images):
        logits = images @ weights + bias
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    for step in range(steps):
        index = order[64 * step : 64 * (step + 1)]
        error = (probabilities(x[index]) - np.eye(10)[y[index]]) / 64
        now = rate * (1 - step / steps)
        weights, bias = weights - now * x[index].T @ error, bias - now * error.sum(0)
    test = probabilities(flat(data.test[0]))
    losses = -np.log(test[np.arange(len(test)), data.test[1]])
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    right = test.argmax(axis=1) == data.test[1]
    assert result["accuracy"] == pytest.approx(right.mean(), abs=1e-6)


@pytest.mark.parametrize("how", [("--scan",), ("--batch-seeds", "2"), ("--no-scan",)])
def test_seeds_at_once_and_compiled_loops_change_nothing(load, tmp_path, how):
    args = ("--random", "20", "--evaluations", "2")
    given = {"seeds": 2, "steps": 6, "optimizers": ["sparse_ggt:window_size=4"]}
    one = run(load, "probe", tmp_path / "one", *args, **given)
    other = run(load, "probe", tmp_path / "other", *args, *how, **given)
    assert one[0]["loss"] != one[1]["loss"]
    for a, b in zip(one, other, strict=True):
        assert a["config"] == b["config"]
        assert a["curve"]["step"] == [3, 6]
        for name in ("loss", "train_loss"):
            np.testing.assert_allclose(a["curve"][name], b["curve"][name], rtol=1e-4)


@pytest.mark.slow
def test_fine_tuning_starts_from_what_the_first_half_has_trained(load, tmp_path):
    args = ("--model", "cnn1d", "--base-steps", "2")
    (first,) = run(load, "finetune", tmp_path / "first", *args)
    (base,) = (path for path in (tmp_path / "first").iterdir() if path.is_dir())
    given = (*args[:2], "--params", str(base))
    (again,) = run(load, "finetune", tmp_path / "again", *given)
    assert again["config"] == first["config"]
    assert again["curve"]["loss"] == pytest.approx(first["curve"]["loss"], rel=1e-5)
    longer = (*args[:3], "3")
    (other,) = run(load, "finetune", tmp_path / "other", *longer)
    assert other["config"]["start"] != first["config"]["start"]


def test_checkpoints_keep_parameters_and_batch_statistics(load, tmp_path):
    convolutional, split = load("lab.convolutional"), load("lab.classifying").split
    _, init = split(lambda rngs: convolutional.Residual(2, 4, 2, rngs))
    states = jax.tree.map(lambda x: x + 0.1, init(jax.random.key(1)))
    checkpoints = load("lab.checkpoints")
    checkpoints.save(tmp_path / "kept", *states)
    restored = checkpoints.restore(tmp_path / "kept", init)
    assert len(jax.tree.leaves(states[1])) == 6  # three norms
    chex.assert_trees_all_equal(restored, states)
    _, other = split(lambda rngs: convolutional.LineCNN(10, 1, rngs))
    with pytest.raises(ValueError, match="no parameters of this model"):
        checkpoints.restore(tmp_path / "kept", other)


def test_what_is_there_is_not_run_again(load, tmp_path, capsys):
    run(load, "probe", tmp_path, "--learning-rates", "0.1", "0.2")
    before = json.loads((tmp_path / "probe.json").read_text())
    capsys.readouterr()
    run(load, "probe", tmp_path, "--learning-rates", "0.1", "0.2")
    assert capsys.readouterr().out.count("there already") == 2
    assert json.loads((tmp_path / "probe.json").read_text()) == before
    run(load, "probe", tmp_path, "--learning-rates", "0.1", seeds=2)
    after = json.loads((tmp_path / "probe.json").read_text())
    assert capsys.readouterr().out.count("there already") == 1
    assert before.items() < after.items()
    assert len(after) == 3


def test_a_write_that_is_stopped_leaves_the_results_before_it(
    load, tmp_path, monkeypatch
):
    results = load("lab.results")
    store = results.Results(tmp_path / "some.json")
    store.add([{"config": {"seed": 0}, "loss": float("nan")}])
    before = (tmp_path / "some.json").read_text()
    assert json.loads(before).popitem()[1]["loss"] is None

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.add([{"config": {"seed": 1}, "loss": 1.0}])
    assert (tmp_path / "some.json").read_text() == before


def test_results_of_two_processes_come_together(load, tmp_path):
    results = load("lab.results")
    first, second = (results.Results(tmp_path / "some.json") for _ in range(2))
    first.add([{"config": {"seed": 0}}])
    second.add([{"config": {"seed": 1}}])
    assert {"seed": 0} in results.Results(tmp_path / "some.json")
    assert {"seed": 1} in results.Results(tmp_path / "some.json")
    assert {"seed": 2} not in results.Results(tmp_path / "some.json")


def test_a_run_that_diverges_is_stopped_and_said_to(load, tmp_path):
    (result,) = run(
        load, "probe", tmp_path, "--learning-rates", "1e38",
        "--warmup", "0", steps=40, optimizers=["sgd"],
    )  # fmt: skip
    assert result["diverged"]
    assert result["loss"] is None
    assert len(result["curve"]["step"]) < 20


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("probe", "--optimizers adam", "no optimizer is called 'adam'"),
        ("probe", "--optimizers sgd:rank=2", "sgd has no setting rank"),
        ("probe", "--optimizers sparse_ggt:density=3", "must be in (0, 1]"),
        ("probe", "--optimizers sgd:momentum", "write key=value"),
        ("probe", "--optimizers ggt:momentum=much", "`momentum` must be"),
        ("probe", "--optimizers ggt:window_size=0", "`window_size` must be"),
        ("probe", "--optimizers sgd:{]", "are no JSON"),
        ("probe", "--learning-rates grid 3", "--learning-rates takes"),
        ("probe", "--learning-rates -1", "--learning-rates takes"),
        ("probe", "--steps 6 --evaluations 4", "must divide the 6 steps"),
        ("probe", "--seeds 3 --batch-seeds 2", "must divide --seeds 3"),
        ("probe", "--steps 0", "must be above 0"),
        ("probe", "--warmup 1", "must be in [0, 1)"),
        ("probe", "--steps 2 --epochs 2", "not both"),
        ("probe", "--batch-size 10000", "is above the 1437 examples"),
        ("probe", "--features none.npz", "none.npz"),
        ("images", "--batch-size 10000", "is above the 1437 images"),
        ("images", "--data-dir none", "data_batch_1.bin is missing"),
        ("vit", "--patch 3", "does not divide"),
        ("vit", "--heads 3", "no multiple of --heads"),
        ("text", "--heads 3", "no multiple of --heads"),
        ("text", "--characters 100", "too short"),
        ("text", "--text none.txt", "none.txt"),
        ("finetune", "--params none", "takes a checkpoint"),
        ("report", "none.json", "none.json is no file of results"),
        ("sweep", "probe --optimizers sgd", "the plans name the optimizers"),
    ],
)
def test_arguments_are_refused_before_anything_is_done(
    load, tmp_path, monkeypatch, capsys, command, args, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        load(command).main([*args.split(), "--output", "out"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_old_results_that_are_none_are_refused(load, tmp_path, capsys):
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(SystemExit):
        load("probe").main(["--output", str(tmp_path)])
    assert "is no file of results" in capsys.readouterr().err


def test_specifications_are_read_as_they_are_written(load):
    optimizers = load("lab.optimizers")
    spec = optimizers.parse('sparse_ggt:metric={"decay":0.9,"floor":0.1},eps=1e-3')
    assert spec.settings == {"metric": {"decay": 0.9, "floor": 0.1}, "eps": 1e-3}
    assert optimizers.parse(str(spec)) == spec
    assert optimizers.parse("sgd").settings == {}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ("", True),
        ("metric=auto", True),
        ("metric=true", True),
        ('metric={"decay":0.9}', True),
        ("metric=false", False),
        ("metric=null", False),
        ("eps=1e-3", False),
    ],
)
def test_what_is_not_named_is_the_default(load, settings, kept):
    optimizers = load("lab.optimizers")
    spec = optimizers.parse(f"ggt:{settings}")
    state = optimizers.make(spec, lambda step: 1.0).init(jnp.zeros((2, 3)))
    assert (optax.tree.get(state, "metric") is not None) == kept


def test_schedules_rise_to_one_and_fall(load):
    shape = load("lab.schedules").shape
    cosine = [float(shape("cosine", 100, 0.1)(t)) for t in range(101)]
    np.testing.assert_allclose(cosine[:11], 0.1 + 0.09 * np.arange(11), rtol=1e-6)
    np.testing.assert_allclose(cosine[55], 0.5, rtol=1e-6)
    assert cosine[100] < 1e-6
    steps = [float(shape("staircase", 164, 0.0)(t)) for t in (0, 81, 83, 122, 124)]
    np.testing.assert_allclose(steps, [1, 1, 0.1, 0.1, 0.01], rtol=1e-5)


def test_a_grid_has_its_size_and_its_centre(load):
    grid = load("lab.schedules").grid
    assert grid(1.0, 5, 2.0) == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert len(grid(0.1, 4, 10**0.5)) == 4


def test_updates_are_clipped_before_the_learning_rate(load):
    optimizers = load("lab.optimizers")
    spec = optimizers.parse("sparse_mfac:window_size=4,clip_update=1,damping=1e-6")
    tx = optimizers.make(spec, lambda step: 0.5)
    params = np.zeros(300, np.float32)
    gradient = np.arange(300, dtype=np.float32) / 300
    update, _ = tx.update(gradient, tx.init(params), params)
    assert np.linalg.norm(update) == pytest.approx(0.5 * 1, rel=1e-5)
    assert np.dot(update, gradient) < 0
