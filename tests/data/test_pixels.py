"""Images from folders, columns and tables: found, looked at once, and refused with their place."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import ViTConfig

from deltaw.data import DataSettings
from deltaw.data.images import ImageEncoder
from deltaw.data.labels import LabelReader
from deltaw.errors import UserError

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
        scale = {
            "image_mean": [0.5] * channels,
            "image_std": [0.5] * channels,
            "rescale_factor": 1 / 255,
            "resample": 2,
        }
        size = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
        written = {**size, **does, **scale, **preprocessor}
        (folder / "preprocessor_config.json").write_text(json.dumps(written))
    return folder


def prepared(train: object, **settings):
    return LabelReader(DataSettings(train=str(train), **{"eval": None, **settings}), None, TASK).prepared()


def refusal(train: object, **settings) -> UserError:
    with pytest.raises(UserError) as caught:
        prepared(train, **settings)
    return caught.value


def test_a_folder_for_each_class_gives_paths_and_classes(tree: Path):
    (tree / "cat" / "notes.txt").write_text("-")
    (tree / ".hidden").mkdir()
    found = prepared(tree)
    assert found.classes == ("cat", "dog")
    assert [e.label for e in found.train] == [0, 0, 0, 1, 1, 1]
    assert found.train[3].image == tree / "dog" / "0.png" and found.train[3].size == (5, 6)
    assert "1 file that is not an image skipped" in found.report.lines()


def test_an_empty_class_and_loose_images_are_refused(tree: Path):
    (tree / "eel").mkdir()
    assert "'eel' has no image" in refusal(tree).what
    picture(0).save(tree / "loose.png")
    assert "in the folder itself" in refusal(tree).what


def test_folders_of_parts_are_not_taken_for_classes(tmp_path: Path, tree: Path):
    for part in ("train", "test"):
        (tmp_path / "all" / part / "cat").mkdir(parents=True)
    assert "data.eval" in str(refusal(tmp_path / "all").hint)


def test_a_broken_image_is_named_before_training(tree: Path):
    whole = (tree / "dog" / "1.png").read_bytes()
    (tree / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    error = refusal(tree)
    assert "cannot be decoded" in error.what and error.where == str(tree / "dog" / "1.png")
    (tree / "dog" / "1.png").write_bytes(b"no image at all")
    assert "unknown image format" in refusal(tree).what


def test_equal_files_are_duplicates_and_sizes_are_reported(tree: Path):
    (tree / "cat" / "copy.png").write_bytes((tree / "cat" / "0.png").read_bytes())
    picture(99, size=(9, 4)).save(tree / "dog" / "wide.png")
    report = prepared(tree).report
    assert report.duplicates == 1
    assert report.image_sizes == (4, 6, 5, 9)
    assert any("4×6 to 5×9 pixels" in line for line in report.lines())


def test_a_turned_photograph_has_the_size_of_the_upright_one(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(ord(name), size=(20, 10)).save(tmp_path / "x" / name / "p.jpg", exif=exif)
    example = prepared(tmp_path / "x").train[0]
    assert example.size == (20, 10) and example.decoded().size == (10, 20)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_encoded_images_in_a_column_are_kept_encoded(tmp_path: Path, kind: str):
    images = [{"bytes": encoded(i), "path": None} for i in range(4)]
    table = pyarrow.table({"image": images, "label": ["x", "y", "x", "y"]})
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    found = prepared(path)
    assert isinstance(found.train[0].image, bytes)
    assert (np.asarray(found.train[1].decoded()) == np.asarray(picture(1))).all()


def test_paths_in_a_column_are_seen_from_the_file(tree: Path):
    (tree.parent / "list.csv").write_text("image,label\npets/cat/0.png,a\npets/dog/0.png,b\n")
    assert len(prepared(tree.parent / "list.csv").train) == 2
    (tree.parent / "list.csv").write_text("image,label\npets/cat/7.png,a\npets/dog/0.png,b\n")
    assert str(refusal(tree.parent / "list.csv").where).endswith("7.png")


def digits(tmp_path: Path, rows: np.ndarray, header: str = "") -> Path:
    path = tmp_path / "digits.csv.gz"
    lines = "\n".join(",".join(str(v) for v in row) for row in rows.tolist())
    path.write_bytes(gzip.compress((header + lines + "\n").encode()))
    return path


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
    error = refusal(digits(tmp_path, np.array([[1, 2, 3, 4, 0], [1, 2, 3, pixel, 1]])))
    assert "0 to 255" in error.what and "row 2" in str(error.where)
    assert "make a square image" in refusal(digits(tmp_path, np.array([[1, 2, 3, 0], [1, 2, 3, 1]]))).what


def test_arrays_of_different_shapes_are_refused_with_their_row(write):
    rows = [{"image": [[1, 2], [3, 4]], "label": 0}, {"image": [[1, 2, 3], [4, 5, 6]], "label": 1}]
    error = refusal(write(rows))
    assert "2×3" in error.what and "row 2" in str(error.where)
    colored = [{"image": [[[1, 2, 3]] * 4] * 4, "label": i % 2, "n": i} for i in range(2)]
    assert prepared(write(colored)).train[0].image.shape == (4, 4, 3)


def test_without_a_preprocessor_images_are_resized_to_minus_one_to_one(tmp_path: Path, tree: Path):
    encoder = ImageEncoder(vit(tmp_path / "m"))
    examples = LabelReader(DataSettings(train=str(tree), eval=None), None, TASK, encoder=encoder).prepared().train
    pixels = encoder.encode(examples)
    assert pixels.shape == (6, 3, 8, 8) and pixels.dtype == torch.float32
    whole = picture(0).resize((8, 8), Image.Resampling.BILINEAR)
    torch.testing.assert_close(pixels[0], torch.from_numpy(np.asarray(whole) / 127.5 - 1).permute(2, 0, 1).float())
    assert encoder.tokens(examples[0]) == 5


def test_the_models_preprocessor_does_the_same_where_it_says_the_same(tmp_path: Path, tree: Path):
    examples = prepared(tree).train
    plain = ImageEncoder(vit(tmp_path / "plain")).encode(examples)
    read = ImageEncoder(vit(tmp_path / "read", resample=2)).encode(examples)
    torch.testing.assert_close(plain, read, atol=1e-5, rtol=0)


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
    assert len(LabelReader(DataSettings(train=str(tree), eval=None), None, TASK, encoder=encoder).prepared().train) == 6
    picture(99, size=(9, 4)).save(tree / "dog" / "wide.png")
    with pytest.raises(UserError) as caught:
        LabelReader(DataSettings(train="x"), None, TASK, classes=("cat", "dog"), encoder=encoder).file(str(tree))
    assert "4×9" in caught.value.what and str(caught.value.where).endswith("wide.png")


def test_an_image_that_breaks_after_it_was_looked_at_is_named(tmp_path: Path, tree: Path):
    encoder = ImageEncoder(vit(tmp_path / "m"))
    examples = prepared(tree).train
    (tree / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        encoder.encode(examples)
    assert caught.value.where == str(tree / "cat" / "0.png")


def test_a_model_that_does_not_say_its_images_size_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="no image_size"):
        ImageEncoder(tmp_path)
