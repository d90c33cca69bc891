"""The learning rate range test, on losses whose turn is known."""

import json

import numpy as np
import optax
import pytest


@pytest.fixture
def probe(load):
    regression = load("lab.regression")
    return regression.workload(regression.digits(), 64)


def test_the_rate_lies_below_the_lowest_smoothed_loss(load):
    ranges = load("lab.ranges")
    rates = np.geomspace(1e-4, 1e2, 121)
    losses = 1 + np.abs(np.log10(rates) - 0.5) ** 2  # a valley at 10^0.5
    seen = ranges.choose(rates, losses)
    lagging = np.log10(seen.turn) - 0.5
    assert 0 < lagging < 20 * np.log10(rates[1] / rates[0])  # an average lags behind
    assert seen.rate == pytest.approx(seen.turn / ranges.BELOW, rel=1e-2)
    # What follows the first loss that is not finite does not count.
    cut = ranges.choose(rates, np.where(np.arange(121) < 30, losses, np.nan))
    assert len(cut.smoothed) == 30
    assert cut.turn == rates[29]


def test_averages_are_of_the_losses_so_far(load):
    ranges = load("lab.ranges")
    losses = np.array([3.0, 1.0, 4.0, 1.5])
    for count in range(1, 5):
        weights = ranges.SMOOTHING ** np.arange(count)[::-1]
        expected = np.average(losses[:count], weights=weights)
        assert ranges.smooth(losses)[count - 1] == pytest.approx(expected)


def test_a_run_stops_where_its_loss_has_turned(load, probe):
    seen = load("lab.ranges").measure(optax.sgd, probe, 1e-3, 1e6, 100)
    assert len(seen.losses) < 100
    assert seen.rates[0] == pytest.approx(1e-3)
    np.testing.assert_allclose(seen.rates[1:] / seen.rates[:-1], 1e9 ** (1 / 99))
    assert seen.losses[0] == pytest.approx(np.log(10), rel=1e-5)
    assert seen.smoothed[-1] > seen.smoothed.min()
    assert 0.01 < seen.rate < 10


@pytest.mark.parametrize(
    ("limits", "message"),
    [((0.0, 1.0, 50), "must rise"), ((1.0, 1.0, 50), "must rise"),
     ((1.0, 2.0, 5), "too short")],
)  # fmt: skip
def test_ranges_that_are_none_are_refused(load, probe, limits, message):
    with pytest.raises(ValueError, match=message):
        load("lab.ranges").measure(optax.sgd, probe, *limits)


def test_the_command_writes_the_rate_and_its_curve(load, tmp_path, capsys):
    load("range_test").main(
        ["probe", "--optimizer", "sparse_ggt:window_size=4", "--steps", "40",
         "--output", str(tmp_path)]
    )  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    assert f"learning rate {kept['rate']:g};" in capsys.readouterr().out
    assert len(kept["rates"]) == len(kept["losses"]) <= 40
    assert path.with_suffix(".png").stat().st_size > 1000


def test_the_command_refuses_a_line_search(load, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("range_test").main(
            ["probe", "--optimizer", "lbfgs", "--output", str(tmp_path)]
        )
    assert "by itself" in capsys.readouterr().err
