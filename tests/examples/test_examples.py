"""The short examples run, and print what the documentation promises."""

import pathlib
import re
import subprocess
import sys

import pytest


EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def output(script, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    ).stdout


@pytest.mark.slow
def test_a_flax_loop_through_an_orbax_checkpoint_is_the_loop_without_a_stop():
    text = output("checkpoint.py")
    equal, arrays = map(int, re.search(r"bit: (\d+) of (\d+)$", text, re.M).groups())
    assert equal == arrays > 10
    assert "losses after the checkpoint equal: True" in text
    for first, last in re.findall(r"loss (\S+) -> (\S+)$", text, re.M):
        assert float(last) < 0.5 * float(first)


@pytest.mark.slow
def test_gradients_accumulated_outside_give_the_parameters_of_multi_steps():
    text = output("accumulate_gradients.py")
    (difference,) = re.findall(r"difference of the parameters: (\S+)$", text, re.M)
    assert float(difference) < 1e-3


@pytest.mark.slow
def test_monitor_prints_and_plots_the_figures_of_a_training(tmp_path):
    file = tmp_path / "monitor.png"
    text = output("monitor.py", "--plot", str(file))
    assert file.stat().st_size > 10_000
    found = re.findall(
        r"loss (\S+), .* angle (\d+) .* rank (\S+), error ratio (\S+)$", text, re.M
    )
    (adam, *ours) = [tuple(map(float, each)) for each in found]
    assert adam[2:] == (0, 0)
    assert len(ours) == 2
    for loss, angle, rank, ratio in ours:
        assert loss < 0.1
        assert 0 < angle < 90  # both descend
        assert 1 < rank <= 32
        assert 0 < ratio < 1


@pytest.mark.slow
def test_influence_finds_mislabelled_examples():
    text = output("influence.py")
    found = re.findall(r"^(with|by|chosen) .* (\S+)$", text, re.M)
    found = {name: float(share) for name, share in found}
    assert found["with"] > 0.7
    assert found["with"] > found["by"] - 0.05
    assert 0.05 < found["chosen"] < 0.15


@pytest.mark.slow
def test_pruning_by_the_inverse_fisher_matrix_is_no_worse_than_by_magnitude():
    text = output("pruning.py")
    (whole,) = re.findall(r"all weights: (\S+)$", text, re.M)
    lines = re.findall(r"^pruned by .*: (.*)$", text, re.M)
    magnitude, ours = (
        [float(each) for each in re.findall(r"(\S+) at", line)] for line in lines
    )
    assert float(whole) > 0.9
    assert len(magnitude) == len(ours) == 4
    assert ours[0] > float(whole) - 0.03
    assert sum(ours) > sum(magnitude) - 0.02


def test_readme_names_every_example():
    text = (EXAMPLES / "README.md").read_text()
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(scripts) > 3
    assert [name for name in scripts if f"`{name}`" not in text] == []


def losses(text):
    """Return the loss behind every name."""
    found = re.findall(r"^(\S.*?) +loss (\S+), accuracy", text, re.M)
    return {name: float(loss) for name, loss in found}


def test_a_replaced_line_trains_as_well_as_dense_rows_in_a_tenth_of_the_memory():
    found = losses(output("01_quick_start.py"))
    assert found["sparse GGT"] < 1.3 * found["dense GGT, the reference"]
    assert found["sparse GGT"] < found["AdamW"]


@pytest.mark.slow
def test_every_compressor_comes_near_to_dense_rows():
    found = losses(output("02_choose_a_compressor.py"))
    assert len(found) == 6
    reference = found.pop("dense, the reference")
    assert max(found.values()) < 1.5 * reference


def test_memory_is_planned_without_allocating_any():
    text = output("03_plan_memory.py")
    sizes = [float(each) for each in re.findall(r"(\S+) bytes a parameter", text)]
    assert sizes == [2.75, 5.0, 26.0, 2.01]
    assert "window.rows.values" in text


@pytest.mark.slow
def test_the_tools_of_optax_go_around_a_preconditioner():
    found = losses(output("04_chain_with_optax.py"))
    assert len(found) == 4
    reference = found.pop("dense, the reference")
    assert max(found.values()) < 1.5 * reference


@pytest.mark.slow
def test_feedback_serves_other_optimizers():
    found = losses(output("05_feedback_for_other_optimizers.py"))
    assert found["Adam, 4 of 128"] < found["Adam, 4 of 128, no feedback"]
    assert found["Muon, 4 of 128"] < 2 * found["Muon, dense, the reference"]


@pytest.mark.slow
def test_a_training_is_a_scan_and_several_are_a_vmap():
    lines = re.findall(r"^.* loss (.*)$", output("06_scan_many_runs.py"), re.M)
    sparse, dense = (
        [float(x) for x in re.findall(r"(\S+) at", each)] for each in lines
    )
    assert len(sparse) == len(dense) == 4
    assert min(sparse) < 1.3 * min(dense)


@pytest.mark.slow
def test_devices_that_send_few_entries_train_with_their_mean():
    text = output("07_compressed_gradients_between_devices.py")
    found = re.findall(r"^(\w+) +sent: loss (\S+), accuracy (\S+), (\d+) b", text, re.M)
    few, dense = (dict(zip("las", map(float, each[1:]), strict=True)) for each in found)
    assert [each[0] for each in found] == ["entries", "everything"]
    # Two of 128 entries of 3 bytes from each of three others, and 8 bytes an entry.
    padded = 4864
    assert few["s"] == 3 * 3 * padded * 2 / 128
    assert dense["s"] == 8 * padded
    assert few["a"] > 0.94
    assert dense["l"] < few["l"] < 2 * dense["l"]
