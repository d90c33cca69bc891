"""Tables and figures of results that are made up here, with outcomes that are known."""

import importlib.util
import json


def made_up(optimizer, rate, seed, loss, **settings):
    """Return a run as the experiments write it."""
    curve = {
        "step": [5, 10],
        "seconds": [0.5, 1.0],
        "train_loss": [2.0, loss],
        "loss": [2.0, loss],
        "accuracy": [0.5, 0.75],
    }
    return {
        "config": {
            "workload": "probe",
            "steps": 10,
            "optimizer": optimizer,
            "settings": settings,
            "learning_rate": rate,
            "seed": seed,
        },
        "loss": loss,
        "accuracy": 0.75,
        "train_loss": loss,
        "seconds": 1.0,
        "milliseconds_per_step": 100.0,
        "curve": curve,
        "bytes_per_parameter": 8.0,
    }


RUNS = [
    *(made_up("adamw_b95", rate, s, rate + s) for rate in (1, 2, 3) for s in (0, 1)),
    *(made_up("sgd", 0.1, s, 9.0 + s) for s in (0, 1)),
    *(made_up("sgd", 0.2, s, 5.0 + s) for s in (0, 1)),
    *(made_up("sgd", 0.4, s, 7.0 + s) for s in (0, 1)),
    made_up("sgd", 0.8, 0, 0.1),  # one seed alone does not win
    *(made_up("muon", 1.0, s, None) for s in (0, 1)),
    *(made_up("sparse_ggt", 1.0, s, 0.5) for s in (0, 1)),
    *(made_up("sparse_ggt", 1.0, s, 0.7, error_feedback=False) for s in (0, 1)),
    *(made_up("sparse_ggt", 1.0, s, 0.4, eps=1e-2) for s in (0, 1)),
]


def test_the_best_learning_rate_is_that_of_lowest_mean_over_all_seeds(load):
    (table,) = load("lab.summary").tables(RUNS)
    best = {str(line.spec): line for line in table.best()}
    assert best["adamw_b95"].learning_rate == 1
    assert best["sgd"].learning_rate == 0.2
    assert table.at_edge(best["adamw_b95"])
    assert not table.at_edge(best["sgd"])
    assert not table.at_edge(best["sparse_ggt"])


def test_a_table_says_means_spreads_edges_and_failures(load):
    summary = load("lab.summary")
    text = summary.markdown(summary.tables(RUNS)[0])
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [
        "sparse_ggt:eps=0.01",
        "sparse_ggt",
        "sparse_ggt:error_feedback=false",
        "adamw_b95",
        "sgd",
        "muon",
    ]
    assert "| 1 * | 1.5 ± 0.7 | 0.7500 ± 0 | 8.0 | 100.00 | 1 2 |" in rows[3]
    assert "diverged (2 of 2)" in rows[5]


def test_runs_of_other_steps_are_another_table(load):
    longer = made_up("sgd", 0.1, 0, 1.0)
    longer["config"]["steps"] = 20
    assert len(load("lab.summary").tables([*RUNS, longer])) == 2


def test_report_draws_every_figure_small(load, tmp_path, capsys):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({str(i): run for i, run in enumerate(RUNS)}))
    load("report").main([str(path), "--output", str(tmp_path / "report")])
    figures = sorted(file.name for file in (tmp_path / "report").glob("*.png"))
    kinds = ("curves", "feedback", "memory", "sensitivity")
    assert figures == [f"probe-1-{kind}.png" for kind in kinds]
    for name in figures:
        file = tmp_path / "report" / name
        assert 1000 < file.stat().st_size < 60_000
        assert f"({name})" in (tmp_path / "report" / "report.md").read_text()
    assert "sparse_ggt" in capsys.readouterr().out


def test_figures_without_anything_to_show_are_left_out(load, tmp_path):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({"a": made_up("sgd", 0.1, 0, 1.0)}))
    load("report").main([str(path), "--output", str(tmp_path)])
    names = sorted(file.name for file in tmp_path.glob("*.png"))
    assert names == ["probe-1-curves.png", "probe-1-memory.png"]


def test_every_plan_names_optimizers_that_can_be_made(load):
    optimizers, sweep = load("lab.optimizers"), load("sweep")
    peers = ("psgd_kron", "prism")
    missing = () if importlib.util.find_spec("rollfast") else peers
    for specs in sweep.PLANS.values():
        assert len(set(specs)) == len(specs) > 4
        for text in specs:
            spec = optimizers.parse(text)
            if spec.name not in missing:
                optimizers.make(spec, lambda step: 1.0)


def test_a_sweep_runs_the_grid_of_every_optimizer(load, tmp_path, monkeypatch):
    sweep = load("sweep")
    monkeypatch.setitem(sweep.PLANS, "comparison", ["sgd", "adamw_b95"])
    sweep.main(["probe", "--steps", "2", "--seeds", "1", "--grid-size", "3",
                "--output", str(tmp_path)])  # fmt: skip
    runs = json.loads((tmp_path / "probe.json").read_text()).values()
    rates = {(r["config"]["optimizer"], r["config"]["learning_rate"]) for r in runs}
    assert rates == {("sgd", r) for r in (0.1, 0.2, 0.4)} | {
        ("adamw_b95", r) for r in (4e-3, 8e-3, 1.6e-2)
    }
