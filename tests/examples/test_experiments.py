"""The experiments run, on tiny sizes: every command, loaders, resuming, tables."""

import importlib
import json
from pathlib import Path
import sys

import numpy as np
from PIL import Image
import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_TEXT = "--layers 1 --width 8 --heads 2 --context 8 --batch-size 4 --windows 4"


@pytest.fixture
def load(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "experiments"))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        found = getattr(sys.modules[name], "__file__", None) or ""
        if found.startswith(str(EXAMPLES)):
            del sys.modules[name]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


def run(main, output, *words):
    """Run a command for a few steps and return its runs."""
    sizes = ["--steps", "4", "--evaluations", "2", "--seeds", "1"]
    main([*sizes, "--output", str(output), *map(str, words)])
    (path,) = output.glob("*.json")
    return list(json.loads(path.read_text()).values())


def check(runs, count):
    assert len(runs) == count
    for each in runs:
        assert np.isfinite(each["loss"])
        assert 0 <= each["accuracy"] <= 1
        assert each["bytes_per_parameter"] > 0
        assert each["curve"]["step"] == [2, 4]


SPECS = ["adamw_b95", "sparse_ggt:window_size=4,metric=true,value_dtype=bfloat16"]


def test_probe(load, tmp_path):
    path = tmp_path / "features.npz"
    rng = np.random.default_rng(0)
    made = {f"x_{k}": rng.normal(size=(40, 6)) for k in ("train", "test")}
    made |= {f"y_{k}": rng.integers(0, 3, 40) for k in ("train", "test")}
    np.savez(path, **made)
    words = ["--optimizers", *SPECS, "--features", path, "--batch-size", 8]
    check(run(load("probe").main, tmp_path / "out", *words), 2)


def test_text(load, tmp_path, text_file):
    words = ["--optimizers", *SPECS, "--text", text_file, *TINY_TEXT.split()]
    check(run(load("text").main, tmp_path / "out", *words), 2)


def test_vision_transformer(load, tmp_path):
    words = "--optimizers sparse_mfac:window_size=4 --width 8 --layers 1 --heads 2"
    check(run(load("vit").main, tmp_path / "out", *words.split()), 1)


def test_fine_tuning_starts_from_what_the_first_half_has_trained(
    load, tmp_path, text_file
):
    words = ["--optimizers", "muon", "--data", "text", "--text", text_file]
    words += [*TINY_TEXT.split(), "--base-steps", "2"]
    main, out = load("finetune").main, tmp_path / "out"
    (first,) = run(main, out, *words)
    (base,) = (path for path in out.iterdir() if path.is_dir())
    (other,) = run(main, tmp_path / "again", *words, "--params", base)
    assert other["config"]["start"] == first["config"]["start"]
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)


def write_cifar(folder, count=20):
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name in names:
        records = rng.integers(0, 256, (count, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)


def test_cifar_is_read_as_it_is_published(load, tmp_path):
    write_cifar(tmp_path)
    data = load("lab.pictures").cifar10(tmp_path)
    record = np.fromfile(tmp_path / "test_batch.bin", np.uint8)[:3073]
    images, labels = data.test
    assert labels[0] == record[0]
    assert images.shape[1:] == (32, 32, 3)
    # Red, green and blue lie one behind the other; standardised a channel.
    planes = record[1:].reshape(3, 32, 32)
    for channel in range(3):
        seen = np.asarray(images[0, :, :, channel], np.float64).ravel()
        line = np.polyfit(planes[channel].ravel().astype(float), seen, 1)
        fitted = np.polyval(line, planes[channel].ravel())
        np.testing.assert_allclose(fitted, seen, atol=1e-3)
    assert len(data.train[1]) == 100


def test_a_broken_file_of_cifar_is_named(load, tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="test_batch"):
        load("lab.pictures").cifar10(tmp_path)


def test_images_of_cifar_train_a_residual_net(load, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_cifar(folder)
    words = ["--model", "resnet20", "--data-dir", folder, "--batch-size", 8]
    words += ["--optimizers", "sparse_ggt:window_size=2,metric=true"]
    check(run(load("images").main, tmp_path / "out", *words), 1)


def test_images_come_from_a_folder_a_class(load, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    folders = load("lab.folders")
    found = folders.find(tmp_path / "data", 32)
    assert list(found.classes) == ["cat", "dog"]
    images, labels = next(iter(folders.batches(found, 4, np.random.default_rng(0))))
    assert images.shape == (4, 32, 32, 3)
    assert set(np.asarray(labels)) <= {0, 1}
    counts = sum(len(batch[1]) for batch in folders.evaluations(found, 3))
    assert counts >= 8


def test_what_is_there_is_not_run_again(load, tmp_path, text_file, monkeypatch):
    main, out = load("text").main, tmp_path / "out"
    words = ["--optimizers", "sgd", "--text", text_file, *TINY_TEXT.split()]
    before = run(main, out, *words)
    trainer = load("lab.training").Trainer
    fit, seen = trainer.fit, []
    monkeypatch.setattr(
        trainer, "fit", lambda *given: (seen.append(given), fit(*given))[1]
    )
    assert run(main, out, *words) == before
    assert not seen
    assert len(run(main, out, *words, "--learning-rates", "0.1", "0.2")) == 2
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizers adam", "adam"),
        ("--optimizers sparse_ggt:windows=3", "windows"),
        ("--optimizers sparse_ggt:density=2", "density"),
        ("--steps 0", "steps"),
        ("--seeds 3 --batch-seeds 2", "batch-seeds"),
        ("--text nowhere.txt", "nowhere"),
    ],
)
def test_arguments_are_checked_before_anything_is_trained(
    load, capsys, tmp_path, words, message
):
    with pytest.raises(SystemExit):
        load("text").main([*words.split(), "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_and_figures_are_made_from_results(load, tmp_path, text_file):
    words = ["--text", text_file, *TINY_TEXT.split(), "--learning-rates", "0.1", "0.2"]
    specs = ["adamw_b95", "sparse_ggt:window_size=2"]
    specs += [f"{specs[1]},error_feedback=false", f"{specs[1]},eps=0.01"]
    out = tmp_path / "out"
    run(load("text").main, out, *words, "--optimizers", *specs)
    load("report").main([str(out / "text.json"), "--output", str(tmp_path / "report")])
    table = (tmp_path / "report" / "report.md").read_text()
    assert all(f"`{spec}`" in table.replace('"', "") for spec in specs[:2])
    figures = list((tmp_path / "report").glob("*.png"))
    kinds = {path.stem.rpartition("-")[2] for path in figures}
    assert kinds == {"curves", "memory", "feedback", "sensitivity"}
    assert all(0 < path.stat().st_size < 60_000 for path in figures)


def test_plans_name_optimizers_that_there_are(load):
    optimizers = load("lab.optimizers")
    for specs in load("sweep").PLANS.values():
        for spec in specs:
            optimizers.make(optimizers.parse(spec), lambda step: 0.1)
