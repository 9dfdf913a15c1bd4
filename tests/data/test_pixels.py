"""Images from folders, columns and tables: found, looked at once, and refused with their place."""

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

from deltaw.data import DataSettings
from deltaw.data.images import ImageEncoder
from deltaw.data.labels import LabelReader
from tests.data.conftest import refusal
from tests.data.hostile_files import write_arrow, write_parquet

TASK = "image-classification"


def picture(seed: int, size=(6, 5), mode="RGB") -> Image.Image:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(seed: int, **more) -> bytes:
    out = io.BytesIO()
    picture(seed, **more).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of three images each."""
    folder = tmp_path / "pets"
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            picture(10 * number + i).save(folder / name / f"{i}.png")
    return folder


def vit(folder: Path, channels: int = 3, **preprocessor: object) -> Path:
    """A model's folder for images of 8×8 in patches of 4."""
    folder.mkdir()
    ViTConfig(image_size=8, patch_size=4, num_channels=channels).save_pretrained(folder)
    if preprocessor:
        does = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
        half = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels, "rescale_factor": 1 / 255, "resample": 2}
        size = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
        (folder / "preprocessor_config.json").write_text(json.dumps({**size, **does, **half, **preprocessor}))
    return folder


def prepared(train: object, encoder: ImageEncoder | None = None, **settings):
    chosen = DataSettings(train=str(train), **{"eval": None, **settings})
    return LabelReader(chosen, None, TASK, encoder=encoder).prepared()


def test_a_folder_for_each_class_gives_paths_and_classes(tree: Path):
    (tree / "cat" / "notes.txt").write_text("-")
    (tree / ".hidden").mkdir()
    found = prepared(tree)
    assert found.classes == ("cat", "dog")
    assert [e.label for e in found.train] == [0, 0, 0, 1, 1, 1]
    assert found.train[3].image == tree / "dog" / "0.png" and found.train[3].size == (5, 6)
    assert "1 file that is not an image skipped" in found.report.lines()


def test_folders_without_images_or_with_loose_ones_are_refused(tmp_path: Path, tree: Path):
    (tree / "eel").mkdir()
    assert "'eel' has no image" in refusal(prepared, tree).what
    picture(0).save(tree / "loose.png")
    assert "in the folder itself" in refusal(prepared, tree).what
    for part in ("train", "test"):  # not taken for classes
        (tmp_path / "all" / part / "cat").mkdir(parents=True)
    assert "data.eval" in str(refusal(prepared, tmp_path / "all").hint)


def test_a_broken_image_is_named_before_training_and_after_it_was_looked_at(tmp_path: Path, tree: Path):
    path = tree / "dog" / "1.png"
    whole, examples = path.read_bytes(), prepared(tree).train
    for content, said in ((whole[: len(whole) // 2], "cannot be decoded"), (b"no image", "unknown image format")):
        path.write_bytes(content)
        error = refusal(prepared, tree)
        assert said in error.what and error.where == str(path)
    assert refusal(ImageEncoder(vit(tmp_path / "m")).encode, examples).where == str(path)


def test_equal_files_are_duplicates_and_sizes_are_reported(tree: Path):
    (tree / "cat" / "copy.png").write_bytes((tree / "cat" / "0.png").read_bytes())
    picture(99, size=(9, 4)).save(tree / "dog" / "wide.png")
    report = prepared(tree).report
    assert (report.duplicates, report.image_sizes) == (1, (4, 6, 5, 9))
    assert any("4×6 to 5×9 pixels" in line for line in report.lines())


def test_a_turned_photograph_has_the_size_of_the_upright_one(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(ord(name), size=(20, 10)).save(tmp_path / "x" / name / "p.jpg", exif=exif)
    example = prepared(tmp_path / "x").train[0]
    assert example.size == (20, 10) and example.decoded().size == (10, 20)


@pytest.mark.parametrize(("kind", "write"), [("parquet", write_parquet), ("arrow", write_arrow)])
def test_encoded_images_in_a_column_are_kept_encoded(tmp_path: Path, kind: str, write):
    images = [{"bytes": encoded(i), "path": None} for i in range(4)]
    write(tmp_path / f"d.{kind}", pyarrow.table({"image": images, "label": ["x", "y", "x", "y"]}))
    found = prepared(tmp_path / f"d.{kind}")
    assert isinstance(found.train[0].image, bytes)
    assert (np.asarray(found.train[1].decoded()) == np.asarray(picture(1))).all()


def test_paths_in_a_column_are_seen_from_the_file(tree: Path, write):
    path = write("image,label\npets/cat/0.png,a\npets/dog/0.png,b\n", "list.csv")
    assert len(prepared(path).train) == 2
    write("image,label\npets/cat/7.png,a\npets/dog/0.png,b\n", "list.csv")
    assert str(refusal(prepared, path).where).endswith("7.png")


def digits(tmp_path: Path, rows: np.ndarray, header: str = "") -> Path:
    lines = "\n".join(",".join(str(v) for v in row) for row in rows.tolist())
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress((header + lines + "\n").encode()))
    return tmp_path / "digits.csv.gz"


def test_a_table_of_bare_numbers_is_pixels_and_then_the_label(tmp_path: Path):
    rows = np.random.default_rng(0).integers(0, 256, (6, 10))
    rows[:, -1] = [3, 7, 3, 7, 3, 7]
    found = prepared(digits(tmp_path, rows))
    assert found.classes == ("3", "7") and found.report.rows_read == 6
    assert (found.train[2].image == rows[2, :9].reshape(3, 3)).all() and found.train[2].row == 3
    headed = prepared(digits(tmp_path, np.array([[1, 0, 1, 2, 3], [0, 9, 8, 7, 6]]), "label,p0,p1,p2,p3\n"))
    assert headed.train[0].image.tolist() == [[0, 1], [2, 3]] and headed.classes == ("0", "1")
    first = prepared(digits(tmp_path, rows[:, ::-1]), columns={"label": "column_1"})
    assert (first.train[0].image.ravel() == rows[0, 8::-1]).all() and first.classes == ("3", "7")


@pytest.mark.parametrize("pixel", [256, -1, 0.5, float("nan")])
def test_pixels_that_are_none_are_refused_with_their_row(tmp_path: Path, pixel: float):
    error = refusal(prepared, digits(tmp_path, np.array([[1, 2, 3, 4, 0], [1, 2, 3, pixel, 1]])))
    assert "0 to 255" in error.what and "row 2" in str(error.where)


def test_arrays_that_are_not_square_or_of_different_shapes_are_refused_with_their_row(tmp_path: Path, write):
    flat = digits(tmp_path, np.array([[1, 2, 3, 0], [1, 2, 3, 1]]))
    assert "make a square image" in refusal(prepared, flat).what
    rows = [{"image": [[1, 2], [3, 4]], "label": 0}, {"image": [[1, 2, 3], [4, 5, 6]], "label": 1}]
    error = refusal(prepared, write(rows))
    assert "2×3" in error.what and "row 2" in str(error.where)
    colored = [{"image": [[[1, 2, 3]] * 4] * 4, "label": i % 2, "n": i} for i in range(2)]
    assert prepared(write(colored)).train[0].image.shape == (4, 4, 3)


def test_images_are_resized_to_minus_one_to_one_as_by_the_models_preprocessor(tmp_path: Path, tree: Path):
    encoder = ImageEncoder(vit(tmp_path / "m"))
    examples = prepared(tree, encoder).train
    pixels = encoder.encode(examples)
    assert pixels.shape == (6, 3, 8, 8) and pixels.dtype == torch.float32
    whole = picture(0).resize((8, 8), Image.Resampling.BILINEAR)
    torch.testing.assert_close(pixels[0], torch.from_numpy(np.asarray(whole) / 127.5 - 1).permute(2, 0, 1).float())
    assert encoder.tokens(examples[0]) == 5
    read = ImageEncoder(vit(tmp_path / "read", resample=2)).encode(examples)
    torch.testing.assert_close(pixels, read, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("own", [{}, {"resample": 2}])
def test_grey_and_coloured_images_get_the_models_channels(tmp_path: Path, channels: int, own: dict):
    for name, mode in (("a", "L"), ("b", "RGB")):
        (tmp_path / "x" / name).mkdir(parents=True)
        picture(1, mode=mode).save(tmp_path / "x" / name / "p.png")
    encoder = ImageEncoder(vit(tmp_path / "m", channels, **own))
    assert encoder.encode(prepared(tmp_path / "x").train).shape == (2, channels, 8, 8)


def test_a_preprocessor_that_does_not_resize_takes_one_size_only(tmp_path: Path, tree: Path):
    encoder = ImageEncoder(vit(tmp_path / "m", do_resize=False))
    assert len(prepared(tree, encoder).train) == 6
    picture(99, size=(9, 4)).save(tree / "dog" / "wide.png")
    reader = LabelReader(DataSettings(train="x"), None, TASK, classes=("cat", "dog"), encoder=encoder)
    error = refusal(reader.file, str(tree))
    assert "4×9" in error.what and str(error.where).endswith("wide.png")


def test_a_model_that_does_not_say_its_images_size_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    assert "no image_size" in refusal(ImageEncoder, tmp_path).what
