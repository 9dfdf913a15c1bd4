"""Images from folders, columns and tables are found, checked once, and rejected with their location."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from transformers import ViTConfig

from deltaw.data.images import ImageEncoder
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.rows import LabelReader
from tests.data.conftest import refusal
from tests.data.hostile_files import write_arrow, write_parquet

TASK = "image-classification"


def random_image(seed: int, size=(6, 5), mode="RGB") -> Image.Image:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(seed: int, **more) -> bytes:
    out = io.BytesIO()
    random_image(seed, **more).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with two classes of three images each."""
    folder = tmp_path / "pets"
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            random_image(10 * number + i).save(folder / name / f"{i}.png")
    return folder


def vit(folder: Path, channels: int = 3, **preprocessor: object) -> Path:
    """Create a model folder for 8×8 images in patches of 4."""
    folder.mkdir()
    ViTConfig(image_size=8, patch_size=4, num_channels=channels).save_pretrained(folder)
    if preprocessor:
        steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
        normalization = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels, "rescale_factor": 1 / 255}
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "resample": 2}
        config = {**processor, **steps, **normalization, **preprocessor}
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def prepared(train: object, encoder: ImageEncoder | None = None, **settings):
    config = DataSettings(train=str(train), **{"eval": None, **settings})
    return LabelReader(config, None, TASK, encoder=encoder).prepare()


def test_class_folders_provide_paths_and_classes(tree: Path):
    (tree / "cat" / "notes.txt").write_text("-")
    (tree / ".hidden").mkdir()
    data = prepared(tree)
    assert data.classes == ("cat", "dog") and [e.label for e in data.train] == [0, 0, 0, 1, 1, 1]
    assert data.train[3].image == tree / "dog" / "0.png" and data.train[3].size == (5, 6)
    assert "1 file that is not an image skipped" in data.report.lines()


def test_empty_class_folders_and_loose_images_are_rejected(tmp_path: Path, tree: Path):
    (tree / "eel").mkdir()
    assert "'eel' has no image" in refusal(prepared, tree).message
    random_image(0).save(tree / "loose.png")
    assert "in the folder itself" in refusal(prepared, tree).message
    for part in ("train", "test"):  # not interpreted as classes
        (tmp_path / "all" / part / "cat").mkdir(parents=True)
    assert "data.eval" in str(refusal(prepared, tmp_path / "all").hint)


def test_broken_image_is_reported_before_and_during_training(tmp_path: Path, tree: Path):
    path = tree / "dog" / "1.png"
    original = path.read_bytes()
    examples = prepared(tree).train
    half = original[: len(original) // 2]
    for content, message in ((half, "cannot be decoded"), (b"no image", "unknown image format")):
        path.write_bytes(content)
        error = refusal(prepared, tree)
        assert message in error.message and error.location == str(path)
    assert refusal(ImageEncoder(vit(tmp_path / "m")).encode, examples).location == str(path)


def test_equal_images_are_duplicates_and_sizes_are_reported(tree: Path):
    (tree / "cat" / "copy.png").write_bytes((tree / "cat" / "0.png").read_bytes())
    random_image(99, size=(9, 4)).save(tree / "dog" / "wide.png")
    report = prepared(tree).report
    assert (report.duplicates, report.image_sizes) == (1, (4, 6, 5, 9))
    assert any("4×6 to 5×9 pixels" in line for line in report.lines())


def test_exif_rotation_is_applied(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        random_image(ord(name), size=(20, 10)).save(tmp_path / "x" / name / "p.jpg", exif=exif)
    example = prepared(tmp_path / "x").train[0]
    assert example.size == (20, 10) and example.decoded().size == (10, 20)


@pytest.mark.parametrize(("kind", "write"), [("parquet", write_parquet), ("arrow", write_arrow)])
def test_encoded_images_in_a_column_remain_encoded(tmp_path: Path, kind: str, write):
    images = [{"bytes": encoded(i), "path": None} for i in range(4)]
    write(tmp_path / f"d.{kind}", pyarrow.table({"image": images, "label": ["x", "y", "x", "y"]}))
    data = prepared(tmp_path / f"d.{kind}")
    assert isinstance(data.train[0].image, bytes)
    assert (np.asarray(data.train[1].decoded()) == np.asarray(random_image(1))).all()


def test_paths_in_a_column_are_relative_to_the_file(tree: Path, write):
    path = write("image,label\npets/cat/0.png,a\npets/dog/0.png,b\n", "list.csv")
    assert len(prepared(path).train) == 2
    write("image,label\npets/cat/7.png,a\npets/dog/0.png,b\n", "list.csv")
    assert str(refusal(prepared, path).location).endswith("7.png")


def digits(tmp_path: Path, rows: np.ndarray, header: str = "") -> Path:
    lines = "\n".join(",".join(str(v) for v in row) for row in rows.tolist())
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress((header + lines + "\n").encode()))
    return tmp_path / "digits.csv.gz"


def test_numeric_table_contains_pixels_and_a_label(tmp_path: Path):
    rows = np.random.default_rng(0).integers(0, 256, (6, 10))
    rows[:, -1] = [3, 7, 3, 7, 3, 7]
    data = prepared(digits(tmp_path, rows))
    assert data.classes == ("3", "7") and data.report.rows_read == 6
    assert (data.train[2].image == rows[2, :9].reshape(3, 3)).all() and data.train[2].row == 3
    headed = prepared(digits(tmp_path, np.array([[1, 0, 1, 2, 3], [0, 9, 8, 7, 6]]), "label,p0,p1,p2,p3\n"))
    assert headed.train[0].image.tolist() == [[0, 1], [2, 3]] and headed.classes == ("0", "1")
    first = prepared(digits(tmp_path, rows[:, ::-1]), columns={"label": "column_1"})
    assert (first.train[0].image.ravel() == rows[0, 8::-1]).all() and first.classes == ("3", "7")


@pytest.mark.parametrize("pixel", [256, -1, 0.5, float("nan")])
def test_invalid_pixels_are_rejected_with_their_row(tmp_path: Path, pixel: float):
    error = refusal(prepared, digits(tmp_path, np.array([[1, 2, 3, 4, 0], [1, 2, 3, pixel, 1]])))
    assert "0 to 255" in error.message and "row 2" in str(error.location)


def test_arrays_of_invalid_shape_are_rejected_with_their_row(tmp_path: Path, write):
    flat = digits(tmp_path, np.array([[1, 2, 3, 0], [1, 2, 3, 1]]))
    assert "make a square image" in refusal(prepared, flat).message
    rows = [{"image": [[1, 2], [3, 4]], "label": 0}, {"image": [[1, 2, 3], [4, 5, 6]], "label": 1}]
    error = refusal(prepared, write(rows))
    assert "2×3" in error.message and "row 2" in str(error.location)
    colored = [{"image": [[[1, 2, 3]] * 4] * 4, "label": i % 2, "n": i} for i in range(2)]
    assert prepared(write(colored)).train[0].image.shape == (4, 4, 3)


def test_preprocessing_matches_the_models_preprocessor(tmp_path: Path, tree: Path):
    encoder = ImageEncoder(vit(tmp_path / "m"))
    examples = prepared(tree, encoder).train
    pixels = encoder.encode(examples)
    assert pixels.shape == (6, 3, 8, 8) and pixels.dtype == torch.float32
    original = random_image(0).resize((8, 8), Image.Resampling.BILINEAR)
    torch.testing.assert_close(pixels[0], torch.from_numpy(np.asarray(original) / 127.5 - 1).permute(2, 0, 1).float())
    assert encoder.tokens(examples[0]) == 5
    read = ImageEncoder(vit(tmp_path / "read", resample=2)).encode(examples)
    torch.testing.assert_close(pixels, read, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preprocessor", [{}, {"resample": 2}])
def test_images_are_converted_to_the_models_channels(tmp_path: Path, channels: int, preprocessor: dict):
    for name, mode in (("a", "L"), ("b", "RGB")):
        (tmp_path / "x" / name).mkdir(parents=True)
        random_image(1, mode=mode).save(tmp_path / "x" / name / "p.png")
    encoder = ImageEncoder(vit(tmp_path / "m", channels, **preprocessor))
    assert encoder.encode(prepared(tmp_path / "x").train).shape == (2, channels, 8, 8)


def test_preprocessor_without_resizing_requires_one_size(tmp_path: Path, tree: Path):
    encoder = ImageEncoder(vit(tmp_path / "m", do_resize=False))
    assert len(prepared(tree, encoder).train) == 6
    random_image(99, size=(9, 4)).save(tree / "dog" / "wide.png")
    reader = LabelReader(DataSettings(train="x"), None, TASK, classes=("cat", "dog"), encoder=encoder)
    error = refusal(reader.file, str(tree))
    assert "4×9" in error.message and str(error.location).endswith("wide.png")


def test_model_without_image_size_is_rejected(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    assert "no image_size" in refusal(ImageEncoder, tmp_path).message
