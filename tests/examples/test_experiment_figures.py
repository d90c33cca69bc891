"""Results that are thinned say and draw the same; dense rows lie beside compressed."""

import json

import numpy as np
import pytest


KINDS = {
    "ggt": (256.0, 0.3),
    "sparse_ggt": (3.0, 0.35),
    "low_rank_ggt": (9.0, 0.4),
    "adamw_b95": (8.0, 0.5),
}


def made_up(name, rate, seed, points=100, **settings):
    """Return a run whose loss is lowest at the rate 1."""
    size, lowest = KINDS[name]
    ends = lowest * rate**2 + 0.001 * seed + (0.2 if settings else 0)
    fall = np.linspace(2, ends, points)
    curve = {
        "step": list(range(1, points + 1)),
        "seconds": [0.123456 * i for i in range(1, points + 1)],
        **{k: fall.tolist() for k in ("train_loss", "loss", "accuracy")},
    }
    config = {"workload": "images", "steps": points, "optimizer": name}
    config |= {"settings": settings, "learning_rate": rate, "seed": seed}
    return {
        "config": config,
        "loss": ends,
        "accuracy": 1 - ends / 4,
        "test_accuracy": 0.9 - ends / 4,
        "milliseconds_per_step": 2.0,
        "curve": curve,
        "bytes_per_parameter": size,
        "machine": {"cores": 2},
    }


@pytest.fixture
def runs():
    return [
        *(made_up(n, r, s) for n in KINDS for r in (1.0, 2.0) for s in (0, 1)),
        *(made_up("sparse_ggt", 1.0, s, error_feedback=False) for s in (0, 1)),
    ]


def test_thinned_results_say_and_draw_the_same(load, tmp_path, runs):
    whole, small = tmp_path / "whole.json", tmp_path / "kept" / "small.json"
    whole.write_text(json.dumps({str(i): run for i, run in enumerate(runs)}))
    report = load("report").main
    report([str(whole), "--output", str(tmp_path / "a"), "--thin", str(small)])
    report([str(small), "--output", str(tmp_path / "b")])
    assert small.stat().st_size < whole.stat().st_size / 8
    texts = [(tmp_path / name / "report.md").read_text() for name in "ab"]
    summary = load("lab.summary")
    (table,) = summary.tables(runs)
    assert summary.markdown(table) in texts[0]
    assert texts[0] == texts[1]
    for path in (tmp_path / "a").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert (tmp_path / "b" / "images-1-beside.png").exists()


def test_curves_are_kept_of_the_best_rates_and_end_where_they_did(load, runs):
    thinned = load("lab.thinning").thin(runs, points=5)
    assert len(thinned) == len(runs)
    for before, after in zip(
        sorted(runs, key=lambda r: json.dumps(r["config"])),
        sorted(thinned, key=lambda r: json.dumps(r["config"])),
        strict=True,
    ):
        assert after["config"] == before["config"]
        assert after["loss"] == before["loss"]
        if before["config"]["learning_rate"] == 1.0:
            assert after["curve"]["step"] == [1, 26, 51, 75, 100]
            np.testing.assert_allclose(
                after["curve"]["loss"],
                [before["curve"]["loss"][i - 1] for i in after["curve"]["step"]],
                rtol=1e-3,
            )
        else:
            assert after["curve"] == {}


def test_a_curve_of_a_run_that_stopped_keeps_its_gaps(load):
    run = made_up("adamw_b95", 1.0, 0, points=3)
    run["curve"]["loss"][-1] = run["loss"] = None
    (thinned,) = load("lab.thinning").thin([run])
    assert thinned["curve"]["loss"][-1] is None
    assert thinned["curve"]["step"] == [1, 2, 3]


def test_dense_and_compressed_rows_of_a_family_stand_beside_each_other(load, runs):
    beside, summary = load("lab.beside"), load("lab.summary")
    (table,) = summary.tables(runs)
    figure = beside.draw(table)
    points, curves = figure.axes
    labels = points.get_legend_handles_labels()[1]
    assert set(labels) == {
        "GGT, dense", "GGT, sparse", "GGT, low rank", "GGT, sparse, no feedback",
        "adamw_b95",
    }  # fmt: skip
    assert points.get_ylabel() == "test accuracy"
    assert len(curves.lines) == 5
    (alone,) = summary.tables([r for r in runs if r["config"]["optimizer"] != "ggt"])
    assert beside.draw(alone) is None


def test_errors_of_a_unit_are_told_and_drawn(load, tmp_path, runs):
    for run in runs:
        run["config"]["unit"] = "log10"
        run["loss"] -= 4
        run["error"] = run.pop("accuracy") - 3
        del run["test_accuracy"]
        run["curve"]["error"] = run["curve"].pop("accuracy")
    (table,) = load("lab.summary").tables(runs)
    assert "| error |" in load("lab.summary").markdown(table)
    figure = load("lab.figures").memory(table)
    assert figure.axes[0].get_ylabel() == "log10 of the loss"
    assert figure.axes[1].get_ylabel() == "log10 of the error"
    assert load("lab.beside").draw(table).axes[0].get_ylabel() == "log10 of the error"
