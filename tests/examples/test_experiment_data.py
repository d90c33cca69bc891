"""Loaders of the experiments, on small files that are written here."""

import gzip
import json

import jax
import numpy as np
import pytest


@pytest.fixture
def cifar(tmp_path):
    """Return a folder of CIFAR-10's form, and the images and labels of its files."""
    rng = np.random.default_rng(0)
    files = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
        labels = rng.integers(0, 10, 4, np.uint8)
        records = [
            bytes([label]) + b"".join(image[:, :, c].tobytes() for c in range(3))
            for image, label in zip(images, labels, strict=True)
        ]
        (tmp_path / f"{name}.bin").write_bytes(b"".join(records))
        files[name] = (images, labels)
    return tmp_path, files


def test_cifar_is_read_as_it_is_written(load, cifar):
    folder, files = cifar
    data = load("lab.pictures").cifar10(folder)
    images, labels = data.train
    assert images.shape == (20, 32, 32, 3)
    np.testing.assert_array_equal(images[4:8], files["data_batch_2"][0])
    np.testing.assert_array_equal(labels[4:8], files["data_batch_2"][1])
    np.testing.assert_array_equal(data.test[0], files["test_batch"][0])


def test_broken_cifar_files_are_refused(load, cifar):
    folder, _ = cifar
    pictures = load("lab.pictures")
    (folder / "data_batch_3.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(ValueError, match="no records of 3073"):
        pictures.cifar10(folder)
    (folder / "data_batch_3.bin").write_bytes(b"\x0a" * 3073)
    with pytest.raises(ValueError, match="labels up to 10"):
        pictures.cifar10(folder)


IDX = {
    "train-images-idx3-ubyte": (40, 5, 6),
    "train-labels-idx1-ubyte": (40,),
    "t10k-images-idx3-ubyte": (8, 5, 6),
    "t10k-labels-idx1-ubyte": (8,),
}


def write_idx(path, array, packed):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    data = head + array.tobytes()
    if packed:
        path, data = path.with_name(path.name + ".gz"), gzip.compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture(params=[True, False], ids=["gzip", "plain"])
def idx(request, tmp_path):
    """Return a folder, and the paths and the arrays of the four files below it."""
    rng = np.random.default_rng(0)
    inner = tmp_path / "set" if request.param else tmp_path / "set" / "MNIST" / "raw"
    arrays = {
        name: rng.integers(0, 256 if len(shape) > 1 else 10, shape, np.uint8)
        for name, shape in IDX.items()
    }
    paths = {n: write_idx(inner / n, a, request.param) for n, a in arrays.items()}
    return tmp_path / "set", paths, arrays


def test_idx_files_are_read_as_they_are_written(load, idx, capsys):
    folder, _, arrays = idx
    pictures = load("lab.pictures")
    data = pictures.read(folder, 0)
    images, labels, test_images, test_labels = arrays.values()
    np.testing.assert_array_equal(data.train[0][..., 0], images)
    np.testing.assert_array_equal(data.train[1], labels)
    np.testing.assert_array_equal(data.test[0][..., 0], test_images)
    np.testing.assert_array_equal(data.test[1], test_labels)
    np.testing.assert_allclose(data.mean, images.mean() / 255, rtol=1e-5)
    assert data.held_out is None
    assert "sha256" in capsys.readouterr().out


def test_what_is_held_out_is_trained_on_no_more(load, idx):
    folder, _, arrays = idx
    data = load("lab.pictures").read(folder, None)
    assert (len(data.train[1]), len(data.held_out[1])) == (36, 4)
    both = np.concatenate([data.train[0], data.held_out[0]])[..., 0]
    order = lambda images: sorted(image.tobytes() for image in images)
    assert order(both) == order(arrays["train-images-idx3-ubyte"])


def damage(name, change):
    return lambda paths: paths[name].write_bytes(change(paths[name].read_bytes()))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage("train-images-idx3-ubyte", lambda b: b[:-9]), "is .*cut short"),
        (damage("t10k-labels-idx1-ubyte", lambda b: b"0000" + b[4:]), "begins with"),
        (lambda p: p["t10k-labels-idx1-ubyte"].unlink(), "lacks t10k-labels-idx1"),
        (
            lambda p: write_idx(
                p["t10k-labels-idx1-ubyte"].with_suffix(""),
                np.zeros(7, np.uint8),
                p["t10k-labels-idx1-ubyte"].suffix == ".gz",
            ),
            "8 images and .* 7 labels",
        ),
    ],
    ids=["short", "magic", "missing", "counts"],
)
def test_broken_idx_files_are_refused(load, idx, harm, message):
    folder, paths, _ = idx
    harm(paths)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load("lab.pictures").read(folder, 0)


def test_rates_are_chosen_on_what_is_held_out_and_tested_once(load, idx, tmp_path):
    folder, _, _ = idx
    load("images").main(
        ["--data-dir", str(folder), "--batch-size", "4", "--steps", "2", "--seeds",
         "1", "--output", str(tmp_path / "out"), "--optimizers", "sgd"]
    )  # fmt: skip
    path = tmp_path / "out" / "images.json"
    (result,) = json.loads(path.read_text()).values()
    assert np.isfinite([result["loss"], result["test_loss"]]).all()
    assert result["loss"] != result["test_loss"]
    assert result["accuracy"] in np.arange(5) / 4  # of four
    assert result["step_bytes"] > 4 * result["parameters"]
    report = load("lab.summary").markdown(load("lab.summary").tables([result])[0])
    assert "test accuracy" in report


def test_augmented_images_are_shifts_and_flips(load):
    images = np.random.default_rng(0).integers(1, 256, (64, 5, 5, 2), np.uint8)
    augment = jax.jit(load("lab.pictures").shift_and_flip, static_argnames="pad")
    moved = np.asarray(augment(images, jax.random.key(0), pad=1))
    seen = set()
    for image, result in zip(images, moved, strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        cases = {
            (row, column, flip): padded[row : row + 5, column : column + 5][:, ::flip]
            for row in range(3)
            for column in range(3)
            for flip in (1, -1)
        }
        (case,) = [name for name, each in cases.items() if (each == result).all()]
        seen.add(case)
    assert len(seen) > 12  # of 18


def test_small_images_are_means_of_squares(load):
    module, rng = load("lab.pictures"), np.random.default_rng(0)
    parts = [
        (rng.integers(0, 256, (n, 4, 6, 2), np.uint8), np.arange(n)) for n in (5, 3, 2)
    ]
    data = module.Pictures("x", *parts[:2], 5, (0.0,), (1.0,), False, parts[2])
    small = module.shrunk(data._replace(mean=(0.1,) * 2), 2)
    for new, (images, labels) in zip(
        (small.train, small.test, small.held_out), parts, strict=True
    ):
        assert new[0].dtype == np.uint8
        np.testing.assert_array_equal(new[1], labels)
        for place in np.ndindex(len(images), 2, 2, 2):
            n, row, column, channel = place
            square = images[
                n, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3, channel
            ]
            assert abs(new[0][place] - square.astype(float).mean()) <= 0.501
    scaled = small.train[0].astype(float).reshape(-1, 2) / 255
    np.testing.assert_allclose(small.mean, scaled.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(small.deviation, scaled.std(axis=0), rtol=1e-5)
    assert small.name != data.name
    with pytest.raises(ValueError, match=r"--image-size 4 must divide .* 4 x 6"):
        module.shrunk(data, 4)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 7, 5, 2)])
def test_pooling_is_that_of_flax(load, shape):
    from flax import nnx

    x = nnx.relu(jax.random.normal(jax.random.key(0), shape))
    expected = nnx.max_pool(x, (2, 2), (2, 2), padding="SAME")
    np.testing.assert_array_equal(load("lab.convolutional")._pooled(x), expected)


@pytest.mark.slow
def test_a_published_experiment_runs_on_cifar(load, cifar, tmp_path):
    folder, _ = cifar
    load("images").main(
        ["--data-dir", str(folder), "--published", "cifar_resnet20", "--batch-size",
         "4", "--steps", "2", "--seeds", "1", "--output", str(tmp_path / "out"),
         "--optimizers", "sparse_mfac:window_size=4"]
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "images.json").read_text())
    (result,) = results.values()
    assert np.isfinite(result["loss"])
    assert result["config"]["schedule"] == "staircase"
    assert result["config"]["learning_rate"] == 1e-3
    assert result["parameters"] == 272_474


def test_residual_networks_have_the_published_numbers_of_parameters(load):
    models, split = load("images").MODELS, load("lab.classifying").split

    def count(name, classes, side):
        _, init = split(models[name](classes, (side, side, 3)))
        params, _ = jax.eval_shape(init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert count("resnet20", 10, 32) == 272_474
    assert count("resnet18", 10, 32) == 11_173_962
    assert count("resnet18", 1000, 224) == 11_689_512


COLORS = {"blue": (0, 0, 255), "green": (0, 200, 0), "red": (255, 0, 0)}


@pytest.fixture
def folders(tmp_path):
    """Return a folder with images of one colour a class, of several sizes."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("grain")
    for part, count in (("train", 4), ("val", 3)):
        for name, color in COLORS.items():
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                size = (20 + 7 * i, 31 - 3 * i)
                image.new("RGB", size, color).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def label_of(images):
    """Return the label of images of one colour, from their pixels."""
    colors = np.array(list(COLORS.values()))
    assert (images == images[:, :1, :1]).all()
    return (images[:, 0, 0, None] == colors).all(-1).argmax(-1)


def test_images_of_folders_come_with_the_labels_of_their_classes(load, folders):
    module = load("lab.folders")
    found = module.find(folders, 8)
    assert found.classes == list(COLORS)
    held_out = list(module.evaluations(found, 4))
    assert [len(labels) for _, labels in held_out] == [4, 4, 1]
    images, labels = (np.concatenate(part) for part in zip(*held_out, strict=True))
    assert images.shape == (9, 8, 8, 3)
    np.testing.assert_array_equal(label_of(images), labels)
    np.testing.assert_array_equal(np.bincount(labels), [3, 3, 3])


def test_training_batches_are_epochs_of_the_seed(load, folders):
    module = load("lab.folders")
    found = module.find(folders, 8)

    def first_three(seed):
        stream = module.batches(found, 4, np.random.default_rng(seed))
        return [next(stream) for _ in range(3)]

    epoch = first_three(0)
    for images, labels in epoch:
        np.testing.assert_array_equal(label_of(images), labels)
    labels = np.concatenate([labels for _, labels in epoch])
    np.testing.assert_array_equal(np.bincount(labels), [4, 4, 4])
    again = np.concatenate([labels for _, labels in first_three(0)])
    np.testing.assert_array_equal(again, labels)
    others = [np.concatenate([y for _, y in first_three(s)]) for s in (1, 2)]
    assert any((other != labels).any() for other in others)


def test_random_boxes_lie_inside_and_have_their_share(load):
    box_of = load("lab.folders")._random_box
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = box_of(40, 30, rng)
        assert 0 <= left < right <= 40
        assert 0 <= top < bottom <= 30
        assert 0.0799 < (right - left) * (bottom - top) / 1200 <= 1


def test_a_network_trains_on_folders(load, folders, tmp_path):
    load("images").main(
        ["--data-dir", str(folders), "--model", "cnn1d", "--image-size", "8",
         "--batch-size", "4", "--epochs", "1", "--seeds", "1", "--optimizers",
         "adamw_b95", "--output", str(tmp_path / "out")]
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "images.json").read_text())
    (result,) = results.values()
    assert result["config"]["steps"] == 3
    assert np.isfinite(result["loss"])


def test_missing_and_unknown_classes_are_refused(load, folders):
    module = load("lab.folders")
    (folders / "val" / "yellow").mkdir()
    with pytest.raises(ValueError, match="train has not: yellow"):
        module.find(folders, 8)
    with pytest.raises(FileNotFoundError, match="has no folders of images"):
        module.find(folders / "train", 8)


def features(path, **changed):
    arrays = {
        "x_train": np.eye(6, 3),
        "y_train": np.arange(6) % 2,
        "x_test": np.eye(4, 3),
        "y_test": np.arange(4) % 2,
    }
    np.savez(path, **{k: v for k, v in (arrays | changed).items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_test": None}, "has no y_test"),
        ({"x_test": np.eye(4, 5)}, "x_train has 3 features, x_test 5"),
        ({"y_train": np.arange(5)}, "must be \\(examples, features\\)"),
        ({"x_train": np.full((6, 3), np.nan)}, "not finite"),
        ({"y_train": np.arange(6.0)}, "must be integers"),
    ],
)
def test_broken_features_are_refused(load, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        load("lab.regression").read(features(tmp_path / "f.npz", **changed))


def test_features_of_a_file_are_trained_on(load, tmp_path):
    path = features(tmp_path / "f.npz")
    load("probe").main(
        ["--published", "--features", str(path), "--batch-size", "3", "--seeds", "1",
         "--output", str(tmp_path)]
    )  # fmt: skip
    (result,) = json.loads((tmp_path / "probe.json").read_text()).values()
    assert result["parameters"] == 3 * 2 + 2
    assert result["config"]["steps"] == 20  # ten epochs
    assert result["config"]["settings"]["window_size"] == 100


def test_characters_of_the_vocabulary_are_kept(load):
    characters = load("lab.characters")
    encoded = characters.encode("a\tb\nü~", 10)
    assert "".join(characters.VOCABULARY[i] for i in encoded) == "ab\n~"
    assert len(characters.encode(characters.standard_library()[:5000], 1000)) == 1000


def test_a_model_does_not_see_the_character_that_it_predicts(load):
    from flax import nnx

    model = load("lab.characters").Model(8, 1, 8, 2, nnx.Rngs(0))
    first = np.arange(8, dtype=np.int32)[None]
    second = first.copy()
    second[0, 5:] += 3
    change = np.abs(model(first) - model(second)).max(axis=(0, 2))
    assert change[:5].max() == 0
    assert change[5:].min() > 0
