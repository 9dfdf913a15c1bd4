"""Rows with images are tokenized with a token id per image feature, which is neither a label nor divided."""

from __future__ import annotations

import base64
import io
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from deltaw.data import row_images
from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.example import Example, token_spans
from deltaw.data.formats import choose_form
from deltaw.data.messages import read_prompt
from deltaw.data.prompt_tokens import encode_prompt
from deltaw.data.prompts import QuestionReader
from deltaw.data.row_images import MARKER, PlacedImage, RowImage, take_images
from deltaw.data.row_reader import RunData
from deltaw.data.rows import NO_FOLDER, NumberedRows, RowFolder
from deltaw.data.stored_rows import ChunkReader, TextReader
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.settings.data import DataSettings
from tests.data.conftest import CHATML, accounted, assistant, make_tokenizer, refusal, user

FIRST_ID = 400
# Both read content parts. The second one writes images before text, as LLaVA's template does.
PARTS = CHATML.replace(
    "{{ m.content }}",
    "{% for p in m.content %}{% if p.type == 'image' %}<pic>{% else %}{{ p.text }}{% endif %}{% endfor %}",
)
IMAGES_FIRST = CHATML.replace(
    "{{ m.content }}",
    "{% for p in m.content if p.type == 'image' %}<pic>\n{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}",
)
Write = Callable[..., str]


def image_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Return the tokenizer with an image token."""
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(["<pic>"], special_tokens=True)
    return tokenizer


class FakePlacer:
    """Places images in brackets, with a token for each row of pixels."""

    placeholder = "<pic>"
    first_id = FIRST_ID

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.token_id = int(tokenizer.convert_tokens_to_ids("<pic>"))
        self.ids: dict[bytes, list[int]] = {}
        self.images: list[Image.Image] = []

    def place(self, image: RowImage) -> PlacedImage:
        decoded = image.decoded()
        start = FIRST_ID + sum(map(len, self.ids.values()))
        ids = self.ids.setdefault(decoded.tobytes(), list(range(start, start + decoded.height)))
        self.images.append(decoded)
        return PlacedImage("[" + "<pic>" * len(ids) + "]", ids)


def picture(value: int, height: int = 2, kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (3, height), (value, value, value)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def read(
    rows: Sequence[dict], folder: Path = Path(), template: str | None = CHATML, **settings
) -> tuple[list[str], list[Example], BadRows]:
    """Return the examples as text, with [n n] for the ids of images, and « and » around labels."""
    tokenizer = image_tokenizer(template)
    placer = FakePlacer(tokenizer)
    numbered = NumberedRows("d", [(str(folder / "d.jsonl"), range(1, len(rows) + 1), rows)])
    config = DataSettings(train="d", **settings)
    bad = BadRows(config.bad_rows)
    encoder = Encoder(tokenizer, "auto", config.labels, images=placer)
    form = choose_form(numbered, columns=config.columns)
    reader = ChunkReader(encoder, form, config, bad)
    examples = [example for row in reader.read(numbered, range(len(rows))) for example in row]
    return [shown(example, tokenizer) for example in examples], examples, bad


def shown(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    text = ""
    previous = False
    for token, is_label in zip(example.tokens.tolist(), example.is_label.tolist(), strict=True):
        text += "" if is_label is previous else "«" if is_label else "»"
        text += f"{token - FIRST_ID} " if token >= FIRST_ID else tokenizer.decode([token])
        previous = is_label
    text = text + "»" * previous
    for mark, short in (("<|im_start|>", "<"), ("<|im_end|>", ">"), ("\n", "/")):
        text = text.replace(mark, short)
    return text


A = data_url(picture(1))
B = data_url(picture(2, height=3))
ANSWER = "<assistant/«red>»"


@pytest.mark.parametrize("template", [CHATML, PARTS])
@pytest.mark.parametrize(
    "image",
    [
        {"type": "image_url", "image_url": {"url": A}},
        {"type": "image_url", "image_url": A},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": A},
        {"type": "image", "bytes": picture(1)},
        {"type": "image", "image": {"bytes": picture(1), "path": None}},
        {"type": "image", "image": Image.new("RGB", (3, 2), (1, 1, 1))},
    ],
)
def test_content_parts_with_images(tmp_path: Path, template: str, image: dict) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    row = {"messages": [user([image, {"type": "text", "text": "color?"}]), assistant("red")]}
    (text,), _, _ = read([row], tmp_path, template)
    line_break = "" if template is PARTS else "/"
    assert text == f"<user/[0 1 ]{line_break}color?>/{ANSWER}"


@pytest.mark.parametrize(
    "images",
    [
        {"images": ["a.png"]},
        {"images": [picture(1)]},
        {"images": [{"bytes": picture(1), "path": "gone.png"}]},
        {"images": [Image.new("RGB", (3, 2), (1, 1, 1))]},
        {"image": A},
        {"image": "a.png"},
        {"image": {"path": "a.png"}},
    ],
)
@pytest.mark.parametrize(
    "texts",
    [
        {"prompt": "color?", "completion": "red"},
        {"prompt": "<image>\ncolor?", "completion": "red"},
        {"instruction": "color?", "output": "red"},
        {"input": "color?", "ideal": "red"},
        {"messages": [user("color?"), assistant("red")]},
        {"messages": [user([{"type": "image"}, {"type": "text", "text": "color?"}]), assistant("red")]},
        {"prompt": [user("color?")], "completion": [assistant("red")]},
        {"conversations": [{"from": "human", "value": "<image>\ncolor?"}, {"from": "gpt", "value": "red"}]},
    ],
)
@pytest.mark.each_value
def test_image_columns_with_and_without_markers(tmp_path: Path, images: dict, texts: dict) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (text,), _, _ = read([{**texts, **images}], tmp_path)
    assert text == f"<user/[0 1 ]/color?>/{ANSWER}"
    (text,), _, _ = read([{**texts, **images}], tmp_path, PARTS)
    assert text == f"<user/[0 1 ]color?>/{ANSWER}"


def test_several_images_keep_their_order_and_equal_images_their_ids() -> None:
    rows = [
        {"messages": [user("<image> or <image>?"), assistant("red"), user("<image>"), assistant("no")]},
        {"messages": [user("why?"), assistant("because")]},
        {"messages": [{"role": "system", "content": "see <image>"}, user("color?"), assistant("red")]},
    ]
    columns = ([A, B, A], None, [B])
    texts, examples, _ = read([{**row, "images": images} for row, images in zip(rows, columns, strict=True)])
    assert texts == [
        "<user/[0 1 ] or [2 3 4 ]?>/<assistant/«red>»/<user/[0 1 ]>/<assistant/«no>»",
        "<user/why?>/<assistant/«because>»",
        "<system/see [2 3 4 ]>/<user/color?>/<assistant/«red>»",
    ]
    assert all((example.tokens[example.is_label] < FIRST_ID).all() for example in examples)


def test_templates_may_write_images_before_the_text() -> None:
    row = {"messages": [user("is <image> darker than <image>?"), assistant("red")], "images": [A, B]}
    (text,), _, _ = read([row], template=IMAGES_FIRST)
    assert text == f"<user/[0 1 ]/[2 3 4 ]/is  darker than ?>/{ANSWER}"
    drops_text = IMAGES_FIRST.replace("{{ p.text }}", "{{ p.text if m.role != 'user' }}")
    assert "omits the content" in refusal(read, [row], template=drops_text).message
    drops_images = PARTS.replace("<pic>", "")
    assert "it changes the answer" in refusal(read, [row], template=drops_images).message


def test_plain_text_rows() -> None:
    rows = [
        {"prompt": "<image> color?", "completion": " red", "image": A},
        {"prompt": [user("a"), assistant("b"), user("<image> c")], "completion": [assistant("d")], "image": B},
        {"prompt": "no image", "completion": " x"},
    ]
    texts, _, _ = read(rows, template=None)
    assert texts == ["[0 1 ] color?« red>»", "a/b>[2 3 4 ] c/«d>»", "no image« x>»"]


def test_rows_rewritten_by_the_template_contain_the_images_of_their_turns() -> None:
    strips = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
    turns = [user("<image> 1"), assistant("<think>t</think>a"), user("<image> 2"), assistant("<think>u</think>b")]
    texts, _, _ = read([{"messages": turns, "images": [A, B]}], template=strips)
    assert texts[0] == "<user/[0 1 ] 1>/<assistant/«<think>t</think>a>»"
    assert texts[1] == "<user/[0 1 ] 1>/<assistant/a>/<user/[2 3 4 ] 2>/<assistant/«<think>u</think>b>»"


def test_images_of_dropped_turns_are_not_placed() -> None:
    row = {"messages": [user("<image>"), assistant("red"), user("<image>")], "images": [A, B]}
    (text,), _, _ = read([row])
    assert text == f"<user/[0 1 ]>/{ANSWER}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "<image> or <image>?", "images": [A]}, "refer to 2 images (<image>), and the row has 1"),
        ({"prompt": "<image>?", "images": [A, B]}, "refer to 1 image (<image>), and the row has 2"),
        ({"prompt": "<image>?"}, "refer to 1 image (<image>), and the row has 0"),
        ({"prompt": [user([{"type": "image"}])], "images": None}, "refer to 1 image"),
        ({"prompt": [user([{"type": "image", "url": A}])], "images": [A]}, "refer to 0 images"),
        ({"prompt": "color?", "completion": "<image>", "images": [A]}, "an answer has an image"),
        ({"prompt": "color?", "completion": [assistant([{"type": "image", "url": A}])]}, "an answer has an image"),
        ({"prompt": "<pic> color?", "images": [A]}, "2 placeholders '<pic>' for 1 image"),
        ({"prompt": "<pic> color?"}, "1 placeholder '<pic>' for 0 images"),
        ({"prompt": "color?", "completion": "<pic>", "images": [A]}, "3 image tokens, and its images have 2"),
        ({"prompt": "color?", "completion": "<pic>"}, "1 image token, and its images have 0"),
        ({"prompt": "c", "images": ["https://example.org/a.png"]}, "a URL (https), and images are not downloaded"),
        ({"prompt": "c", "images": ["HTTP://example.org/a.png"]}, "a URL (http)"),
        ({"prompt": [user([{"type": "image_url", "image_url": {"url": "http://x/a"}}])]}, "a URL (http)"),
        ({"prompt": [user([{"type": "image_url"}])]}, "the image is empty"),
        ({"prompt": [user([{"type": "text", "text": "c", "image": A}])]}, "part of another type has an image"),
        ({"prompt": "c", "image": np.zeros((4, 4, 3))}, "the image is a ndarray"),
        ({"prompt": "c", "images": ["data:image/png;base64,%"]}, "not valid base64"),
        ({"prompt": "c", "images": ["data:image/svg+xml,<svg/>"]}, "not valid base64"),
        ({"prompt": "c", "images": [None]}, "the image is empty"),
        ({"prompt": "c", "images": [7]}, "the image is a int"),
        ({"prompt": "c", "images": [{"bytes": None, "path": None}]}, "the image is a dict"),
        ({"prompt": "c", "image": "gone.png"}, "the image is not a file"),
        ({"prompt": "c", "image": "."}, "the image is not a file"),
        ({"prompt": "c", "image": "a\0b"}, "the image"),
        ({"prompt": "c", "image": "x" * 5000}, "cannot be read"),
    ],
)
def test_unusable_references_name_the_row(row: dict, message: str) -> None:
    good = {"prompt": "color?", "completion": "red", "image": A}
    rows = [good, {"completion": "red", **row}, good]
    error = refusal(read, rows)
    assert isinstance(error, BadRowError) and message in error.message
    assert (error.location or "").startswith("d.jsonl, row 2") and error.hint
    texts, _, bad = read(rows, bad_rows="skip")
    assert texts == [f"<user/[0 1 ]/color?>/{ANSWER}"] * 2 and len(bad) == 1


def _bomb() -> bytes:
    """Return a PNG that claims 300 million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    pixels = chunk(b"IDAT", zlib.compress(bytes(2**20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [picture(1, height=90)[:-30], _bomb(), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"", b"%!PS-Adobe-3.0 EPSF"],
    ids=["truncated", "bomb", "svg", "empty", "postscript"],
)
def test_images_that_cannot_be_decoded_are_skipped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    good = {"prompt": "c", "completion": "red", "image": A}
    broken = {"prompt": "c", "completion": "d"}
    rows = [{**broken, "image": "a.png"}, {**broken, "image": data_url(content)}, good]
    error = refusal(read, rows, tmp_path)
    assert "cannot be decoded" in error.message and "row 1, image 1" in str(error.location)
    assert "a.png" in str(error.location)
    texts, _, bad = read(rows, tmp_path, bad_rows="skip")
    assert texts == [f"<user/[0 1 ]/c>/{ANSWER}"] and bad.counts == {"an image that cannot be read": 2}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read all files")
def test_files_without_permission_are_unusable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "a.png").chmod(0)
    assert (
        "Permission denied" in refusal(read, [{"prompt": "c", "completion": "d", "image": "a.png"}], tmp_path).message
    )


def test_unusual_images_are_decoded() -> None:
    gif = io.BytesIO()
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    deep = io.BytesIO()
    Image.fromarray(np.full((2, 3), 40_000, np.uint16)).save(deep, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter
    images = [
        picture(1, height=1)[:],
        gif.getvalue(),
        picture(1, kind="JPEG", mode="CMYK"),
        deep.getvalue(),
        picture(9, mode="P"),
        picture(9, mode="RGBA"),
        picture(1, kind="JPEG", exif=exif),
    ]
    rows = [{"prompt": "c", "completion": "d", "image": content} for content in images]
    tokenizer = image_tokenizer()
    placer = FakePlacer(tokenizer)
    for row in rows:
        _, (image,) = take_images(row, NO_FOLDER, "row 1")
        placer.place(image)
    assert [image.mode for image in placer.images] == ["RGB"] * len(images)
    assert placer.images[1].getpixel((0, 0)) == (254, 0, 0) or placer.images[1].getpixel((0, 0)) == (255, 0, 0)
    assert placer.images[-1].size == (2, 3)


# Length


def long_row(image_at: int) -> dict:
    """Return a row with an image at this position of the prompt."""
    return {"prompt": "p" * image_at + "<image>", "completion": "c" * 40, "image": A}


@pytest.mark.parametrize(("policy", "limit"), [("cut", 30), ("cut", 13), ("cut", 12), ("drop", 30), ("split", 30)])
def test_images_are_neither_cut_nor_split(policy: str, limit: int) -> None:
    rows = [long_row(5), {"prompt": "p", "completion": "c" * 60}, {"prompt": "p", "completion": "c"}]
    numbered = NumberedRows("d", [("d.jsonl", range(1, 4), rows)])
    tokenizer = image_tokenizer(None)
    config = DataSettings(train="d", long_rows=policy, max_length=limit)
    encoder = Encoder(tokenizer, images=FakePlacer(tokenizer))
    reader = ChunkReader(encoder, choose_form(numbered), config, BadRows())
    with_image, text_only, short = reader.read(numbered, range(3))
    assert len(short) == 1
    assert len(text_only) == {"cut": 1, "drop": 0}.get(policy, len(text_only)) and (policy != "split" or text_only[1:])
    kept = policy == "cut"  # the image ends at the eighth token
    assert len(with_image) == kept
    assert reader.account["dropped_long"] == (policy == "drop") + (not kept)
    for example in [*with_image, *text_only]:
        assert len(example) <= limit and np.isin(example.tokens, [FIRST_ID, FIRST_ID + 1]).sum() in (0, 2)


def test_rows_are_cut_only_after_their_last_image() -> None:
    turns = {"prompt": [user("a"), assistant("bbb"), user("<image>")], "completion": [assistant("c")], "image": A}
    row = {"messages": [*turns["prompt"], *turns["completion"]], "image": A}
    whole = "a/«bbb>»[0 1 ]/«c>»"
    texts = {n: read([row], template=None, long_rows="cut", max_length=n)[0] for n in (6, 7, 8, 9, 13)}
    assert texts == {6: [], 7: [], 8: [], 9: ["a/«bbb>»[0 1 "], 13: [whole]}


def test_images_of_a_row_have_a_maximum_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_images, "MAX_TOKENS", 7)
    row = {"prompt": "c", "completion": "red", "images": [A] * 3}
    assert len(read([row])[0]) == 1
    assert "more than 7 tokens" in refusal(read, [{**row, "images": [A] * 4}]).message


# Reading files


def run_data(path: str, placer: FakePlacer, tokenizer: PreTrainedTokenizerFast, **settings) -> RunData:
    return TextReader(DataSettings(train=path, **{"eval": None, **settings}), tokenizer, images=placer).prepare()


def test_files_are_read_in_order_without_cache_and_report_no_image_column(write: Write, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [{"prompt": f"q{n}", "completion": "a", "images": [f"{n % 3}.png"], "id": n} for n in range(6)]
    path = write([*rows, {"prompt": "text", "completion": "only", "id": 7}])
    for cache in (True, False):
        tokenizer = image_tokenizer()
        data = run_data(path, FakePlacer(tokenizer), tokenizer, cache=cache)
        ids = [row.tokens[row.tokens >= FIRST_ID].tolist() for row in data.train]
        assert ids == [[400, 401], [402, 403], [404, 405]] * 2 + [[]]
        assert data.report.unused_columns == ("id",)
    without = TextReader(DataSettings(train=path, eval=None), tokenizer).prepare()
    assert without.report.unused_columns == ("images", "id")


def test_typed_columns_contain_images(tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "color?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    rows = [{"messages": messages, "images": [{"bytes": picture(n), "path": None}]} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    tokenizer = image_tokenizer(PARTS)
    data = run_data(str(tmp_path / "d.parquet"), FakePlacer(tokenizer), tokenizer)
    assert [row.tokens[row.tokens >= FIRST_ID].tolist() for row in data.train] == [[400, 401], [402, 403], [404, 405]]


def test_mapped_columns_and_skipped_rows_are_counted(write: Write, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = [{"prompt": "q", "completion": "a", "photo": name} for name in ("a.png", "gone.png")]
    tokenizer = image_tokenizer()
    settings = {"columns": {"image": "photo"}, "bad_rows": "skip"}
    data = run_data(write(rows), FakePlacer(tokenizer), tokenizer, **settings)
    assert data.report.bad_rows == {"an image that cannot be read": 1} and accounted(data.report) == 2
    assert data.report.unused_columns == ()
    (line,) = data.skipped.lines()
    assert "row 2, image 1" in str(line["where"]) and "gone.png" in str(line["where"])


def test_images_of_a_package_are_found_next_to_its_rows(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    path = write([{"prompt": "q", "completion": "a", "image": "a.png"}])
    monkeypatch.setattr(packages, "member", lambda reference: Path(path))
    tokenizer = image_tokenizer()
    data = run_data("pypi:pictures==1.0/rows/data.jsonl", FakePlacer(tokenizer), tokenizer)
    assert (data.train[0].tokens >= FIRST_ID).sum() == 2


def test_text_models_reject_image_parts_and_ignore_image_columns() -> None:
    tokenizer = make_tokenizer()
    row = {"messages": [user([{"type": "image", "url": A}]), assistant("red")]}
    numbered = NumberedRows("d", [("d.jsonl", [1], [row])])
    reader = ChunkReader(Encoder(tokenizer), choose_form(numbered), DataSettings(train="d"), BadRows())
    assert "the model reads text only" in refusal(reader.read, numbered, [0]).message


# Showing and checking rows


def test_image_tokens_are_shown_as_one_span() -> None:
    tokenizer = image_tokenizer()
    tokens = [*tokenizer("é ")["input_ids"], 400, 401, 402, 400, 401, *tokenizer(" b")["input_ids"]]
    is_label = [False] * (len(tokens) - 2) + [True] * 2
    spans = token_spans(tokens, is_label, tokenizer)
    assert [(span.text, span.label, span.special, span.tokens) for span in spans] == [
        ("é ", False, False, 3),
        ("<image 3 tokens>", False, True, 3),
        ("<image 2 tokens>", False, True, 2),
        (" b", True, False, 2),
    ]


def test_shown_rows_contain_images_and_remarks(write: Write, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "image": image} for image in (A, "gone.png")]
    tokenizer = image_tokenizer()
    reader = TextReader(DataSettings(train=write(rows), eval=None), tokenizer, images=FakePlacer(tokenizer))
    shown_row, refused = reader.rows(BadRows("skip"))
    assert "<image 2 tokens>" in [span.text for span in shown_row.examples[0].spans]
    assert not refused.examples and "refused: the image is not a file" in refused.notes[0]


def test_check_compares_images_and_reports_unreadable_ones(write: Write) -> None:
    rows = [{"prompt": "color?", "completion": answer, "image": image} for image, answer in ((A, "red"), (B, "blue"))]
    rows += [{"prompt": "color?", "completion": "red", "image": "gone.png"}]
    rows += [{"prompt": "color?", "completion": "", "image": A}, {"prompt": "none", "completion": "red"}]
    rows += [{"prompt": "<image> " + "long " * 50 + "<image>", "completion": "x", "images": [A, B]}]
    tokenizer = image_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    settings = DataSettings(train=write(rows), eval=None, max_length=100, long_rows="cut")
    check = TextReader(settings, tokenizer, images=FakePlacer(tokenizer)).check([])
    findings = {finding.name: finding for finding in check.findings if finding.count}
    assert not findings.keys() & {"contradictions", "near_duplicates", "duplicates", "special_tokens_in_text"}
    assert findings["divided_image"].count == 1 and "row 6" in findings["divided_image"].rows[0]
    assert findings["no_image"].count == 1 and "row 5" in findings["no_image"].rows[0]
    assert any("an image that cannot be read" in finding.text for finding in check.findings)


@pytest.mark.parametrize(("column", "level"), [("image", "warning"), ("my_Photo", "warning"), ("id", "note")])
def test_check_reports_unused_columns(write: Write, column: str, level: str) -> None:
    tokenizer = image_tokenizer()
    settings = DataSettings(train=write([{"text": "a", "group": 1, column: A}]), eval=None, group="group")
    check = TextReader(settings, tokenizer, images=FakePlacer(tokenizer)).check([])
    (finding,) = [finding for finding in check.findings if finding.name == "unused_columns"]
    assert finding.level == level and finding.text.endswith(f": {column}")


# Prompts


@pytest.mark.parametrize("template", [CHATML, PARTS, None])
def test_prompts_have_the_tokens_of_training(template: str | None) -> None:
    question = user([{"type": "image", "url": A}, {"type": "text", "text": "color?"}])
    _, (example,), _ = read([{"messages": [question, assistant("red")]}], template=template)
    tokenizer = image_tokenizer(template)
    placer = FakePlacer(tokenizer)
    tokens = encode_prompt([question], "auto", tokenizer, images=placer)
    assert tokens.tolist() == example.tokens[: example.prompt_length].tolist()
    row, images = take_images({"messages": [question]}, NO_FOLDER, "the prompt")
    encoder = Encoder(tokenizer, images=placer)
    assert encoder.prompt(read_prompt(row["messages"], "p"), images=images) == tokens.tolist()


def test_prompts_of_others_cannot_read_files_or_write_image_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    tokenizer = image_tokenizer()
    placer = FakePlacer(tokenizer)

    def encode(content: object, folder: RowFolder = NO_FOLDER) -> np.ndarray:
        return encode_prompt([user(content)], "auto", tokenizer, images=placer, image_folder=folder)

    part = [{"type": "image", "path": "a.png"}]
    assert len(encode(part, RowFolder(tmp_path)))
    for content in (part, [{"type": "image"}]):
        with pytest.raises(UserError):
            encode(content)


def test_markers_in_questions_are_text() -> None:
    tokenizer = image_tokenizer()
    placer = FakePlacer(tokenizer)
    text = "is <image> or <pic> a tag?"
    written = text.replace("<", "<\u200b")
    for question in (text, [user(text)], [user([{"type": "text", "text": text}])]):
        tokens = encode_prompt(question, "auto", tokenizer, images=placer)  # type: ignore[arg-type]
        assert placer.token_id not in tokens and tokens.max() < FIRST_ID
        assert written.replace(" ", "") in tokenizer.decode(tokens).replace(" ", "")
    parts = [{"type": "image", "url": A}, {"type": "text", "text": text}]
    tokens = encode_prompt([user(parts)], "auto", tokenizer, images=placer)
    assert (tokens >= FIRST_ID).sum() == 2 and placer.token_id not in tokens
    with pytest.raises(BadRowError):  # markers refer to attached images
        encode_prompt(text + MARKER, "auto", tokenizer, images=placer, attached=[picture(1)])


def test_questions_for_predictions_have_images(write: Write) -> None:
    rows = [{"prompt": "color?", "image": A}, {"messages": [user([{"type": "image", "url": B}])]}, {"prompt": "text"}]
    tokenizer = image_tokenizer()
    settings = DataSettings(train=write(rows), eval=None)
    reader = QuestionReader(settings, tokenizer, continues=False, images=FakePlacer(tokenizer))
    data, _ = reader.file(settings.train)  # type: ignore[arg-type]
    ids = [row.tokens[row.tokens >= FIRST_ID].tolist() for row in data]
    assert ids == [[400, 401], [402, 403, 404], []]


def test_json_lines_round_trip(write: Write) -> None:
    row = {"messages": [user([{"type": "image_url", "image_url": {"url": A}}]), assistant("red")]}
    tokenizer = image_tokenizer()
    data = run_data(write(json.dumps(row)), FakePlacer(tokenizer), tokenizer)
    assert data.train[0].tokens[data.train[0].tokens >= FIRST_ID].tolist() == [400, 401]


def test_16_bit_images_keep_their_contrast() -> None:
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 20_000, 40_000, 65_535]], np.uint16)).save(out, "PNG")
    assert np.asarray(RowImage(out.getvalue(), "row").decoded())[0, :, 0].tolist() == [0, 78, 156, 255]


def test_tokens_beyond_the_vocabulary_are_rejected() -> None:
    tokenizer = image_tokenizer()
    tokenizer.add_tokens(["<more>"], special_tokens=True)
    placer = FakePlacer(tokenizer)
    placer.first_id = placer.token_id + 1  # the vocabulary ends before the last token
    error = refusal(Encoder(tokenizer, images=placer).prompt, [user("what is <more>?")])
    assert "a token beyond the model's vocabulary" in error.message
