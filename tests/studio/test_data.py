"""Page of the rows: files of all kinds, columns, findings, tokens and Excel files."""

from __future__ import annotations

import base64
import concurrent.futures
import html
import json
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")
from deltaw.child_process import run_command
from deltaw.errors import UserError
from deltaw.settings import task_registry
from deltaw.studio import data, row_calls, spreadsheets
from deltaw.studio.worker import Pending
from deltaw.studio.workspace import move_to_unused
from tests.byte_models import save_model, tiny_llama

CLASSES = next(entry.name for entry in task_registry.entries() if entry.serves == "classes")
REVIEWS = "stars,review\n" + "".join(f"{'good' if i % 2 else 'bad'},This is review {i * i}.\n" for i in range(30))


class SyncWorker:
    """Worker that runs each call at once in this process, through JSON like the process does."""

    def __init__(self, model: Path) -> None:
        self.model = str(model)
        self.calls = []

    def result(self, call, arguments, *, draft=""):
        self.calls.append((call, arguments))
        if call == "preview" and arguments["model"] is None:  # the default model is large
            arguments = arguments | {"model": self.model}
        return json.loads(json.dumps(row_calls.CALLS[call](**arguments)))


@pytest.fixture
def pages(client):
    """Client of a studio with a small model in its folder and a worker in this process."""
    folder = client.studio.workspace.folder
    client.worker = SyncWorker(save_model(tiny_llama(), folder / "model"))
    client.studio.worker.result = client.worker.result
    return client


def draft_of(client, name: str, content: str | bytes) -> str:
    """Put a file into the folder, and return the address of its draft."""
    file = client.studio.workspace.folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    response = client.post("/drafts", data={"file": name})
    assert response.status_code == 303
    return response.headers["location"].removesuffix("/data")


def text_of(response) -> str:
    """Return the text of a page without markup and with single spaces."""
    text = re.sub(r"<(script|style|select)\b.*?</\1>", " ", response.text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", text)))


def stored(client, address: str):
    return client.studio.workspace.draft(address.rpartition("/")[2])


def workbook(*sheets: list[list[object]]) -> bytes:
    """Return an Excel file with inline texts, numbers and dates (style 1)."""
    import io

    def cell(value: object) -> str:
        if isinstance(value, str):
            return f'<c t="inlineStr"><is><t>{escape(value)}</t></is></c>' if value else "<c/>"
        return f'<c s="1"><v>{value[0]}</v></c>' if isinstance(value, tuple) else f"<c><v>{value}</v></c>"

    names = "".join(f'<sheet name="S{n}" sheetId="{n}" r:id="r{n}"/>' for n in range(1, len(sheets) + 1))
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    links = "".join(
        f'<Relationship Id="r{n}" Type="{kind}/worksheet" Target="s{n}.xml"/>' for n in range(1, len(sheets) + 1)
    )
    links += f'<Relationship Id="style" Type="{kind}/styles" Target="styles.xml"/>'
    package = "http://schemas.openxmlformats.org/package/2006/relationships"
    styles = f'<styleSheet {main}><cellXfs count="2"><xf numFmtId="0"/><xf numFmtId="14"/></cellXfs></styleSheet>'
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("xl/workbook.xml", f'<workbook {main} xmlns:r="{kind}"><sheets>{names}</sheets></workbook>')
        root = f'<Relationship Id="r" Type="{kind}/officeDocument" Target="xl/workbook.xml"/>'
        archive.writestr("_rels/.rels", f'<Relationships xmlns="{package}">{root}</Relationships>')
        archive.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{package}">{links}</Relationships>')
        archive.writestr("xl/styles.xml", styles)
        for number, rows in enumerate(sheets, start=1):
            cells = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
            archive.writestr(f"xl/s{number}.xml", f"<worksheet {main}><sheetData>{cells}</sheetData></worksheet>")
    return buffer.getvalue()


def open_document(sheets: dict[str, list[list[object]]]) -> bytes:
    """Return an OpenDocument file with texts and numbers."""
    import io

    def cell(value: object) -> str:
        kind = '"string"' if isinstance(value, str) else f'"float" office:value="{value}"'
        return f"<table:table-cell office:value-type={kind}><text:p>{value}</text:p></table:table-cell>"

    tables = ""
    for name, rows in sheets.items():
        cells = [
            f"<table:table-row>{''.join(map(cell, row)) or '<table:table-cell/>'}</table:table-row>" for row in rows
        ]
        tables += f'<table:table table:name="{name}">{"".join(cells)}</table:table>'
    prefix = "urn:oasis:names:tc:opendocument:xmlns"
    spaces = " ".join(f'xmlns:{n}="{prefix}:{n}:1.0"' for n in ("office", "table", "text"))
    body = f"<office:body><office:spreadsheet>{tables}</office:spreadsheet></office:body>"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr("META-INF/manifest.xml", f'<m:manifest xmlns:m="{prefix}:manifest:1.0"/>')
        archive.writestr("content.xml", f"<office:document-content {spaces}>{body}</office:document-content>")
    return buffer.getvalue()


# Compressed file of Excel 97 with an empty sheet "Notes" and a sheet "Data" with the same cells as TABLE.
XLS = zlib.decompress(
    base64.b85decode(
        "c-rk)O=uHA6#iy^nxrIYQd6N7YA9H3?M1wJX;($<$x^*2BIw5MK^jttdr%KrtvL#UC&f#l7cW&W{-6iFc@Qd!2!fF4u_r;nL!0%@%PgjC#0F}y"
        "GT-vvynXZD&fA$cv$OMNE?u5}*j2$Y48cS-h@quUCx~L<O$t;W1X2vkC{duXp%9DGK(^R;mUtbJV<^YF0s{}Mm&Ae3L?>|$BNGKLyN=k;F}Om;"
        "Feog_Jp*@%lIY~P+L@nWzKQvLwtdcgFKccvA0*qdIDt85q<@df<KspT*CmMyJZ7Jdtl5PQypnl*<)*0F+Spe->*oK>if${88PLcLdj+rP=F7;?"
        "5YFIxkOjVlbM-}5>(^H=K>8m`^^pepTZRQpA~-E%B9@TAdsEifG~s;jd<k*HY^ktt!1dh)Y$XXH`Q8PeYV&T+%Tr#sM7dVENb{slEt%8_PW3qP"
        "F|@Iq=7dktvb}Kc>)XS*QRftECV3&RVVjH(0j^39a!xM$O!TwIPUhG6sasg?VxFP*pt5(gLkWkb*ycLd_EI~$8Sk9!b@C39OY=vbbeFz3eI(Bg"
        "S1x5{KRDCqq0i44`O9kx17bkjxh?V32}_|ChEL2pS1b}kMmru!ftHA0Si3$GzwI-Nxv>HJENY}w?19<`v|*9^4AdVIwL956LfMN3_JZx@6E7RB"
        "98a2iS=yTo>`k^emA%RK^QIa@G#Wz<4Gj$q4Gj&AKSHQYsj0T8w%Yne)Va<gQB@z4{I@uY3A%jxEj@?=l|@`^Dt|V^7U8qRDt*H9LWyJ4dJ*Hu"
        "aUA1K=P&)bi2C<gwPR}Srckr(SDT6RFSq{_g+T7{"
    )
)
TABLE = [["text", "label"], ["a", 1], [], ["b", 2.5]]


@pytest.mark.parametrize("kind", ["xls", "ods", "xlsx"])
def test_page_names_spreadsheet_sheet_and_empty_rows(pages, kind):
    contents = {
        "xls": lambda: XLS,
        "ods": lambda: open_document({"Notes": [], "Data": TABLE}),
        "xlsx": lambda: workbook([], TABLE),
    }
    address = draft_of(pages, f"table.{kind}", contents[kind]())
    rows = (pages.studio.workspace.folder / "table.jsonl").read_text().splitlines()
    assert list(map(json.loads, rows)) == [{"text": "a", "label": 1}, {"text": "b", "label": 2.5}]
    shown = text_of(pages.get(f"{address}/data"))
    names = ("S2", "S1") if kind == "xlsx" else ("Data", "Notes")
    assert f"Rows of the sheet “{names[0]}” in table.{kind}" in shown
    assert f"Other sheets are not used: {names[1]}." in shown
    assert "1 empty row was skipped, so later row numbers differ." in shown
    assert f"table.{kind}</a>" in pages.get("/").text


def replace_in_archive(content: bytes, name: str, changes: dict[str, str]) -> bytes:
    """Return the zip file with these texts of an entry replaced."""
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        for entry in source.namelist():
            text = source.read(entry).decode()
            if entry == name:
                for old, new in changes.items():
                    assert old in text
                    text = text.replace(old, new, 1)
            target.writestr(entry, text)
    return buffer.getvalue()


FILTERED = '<row r="3" hidden="1"><c t="inlineStr"><is><t>b'
HIDDEN_COLUMNS = '<cols><col min="2" max="16384" hidden="true"/></cols><sheetData>'


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({'<row><c t="inlineStr"><is><t>b': FILTERED, "</sheetData>": '</sheetData><autoFilter ref="A1:B4"/>'}, (1, 0)),
        ({"<sheetData>": HIDDEN_COLUMNS}, (0, 1)),
        ({"<row></row>": '<row hidden="1"></row>'}, None),
        ({}, None),
    ],
    ids=["filter", "column", "empty row", "none"],
)
def test_hidden_rows_and_columns_are_reported_and_used(client, changes, note):
    table = [["text", "label"], ["a", 1], ["b", 2], [], ["c", 3]]
    file = client.studio.workspace.folder / "table.xlsx"
    file.write_bytes(replace_in_archive(workbook([], table), "xl/s2.xml", changes))
    rows = spreadsheets.convert(client.studio.workspace, file)
    assert [json.loads(line)["text"] for line in rows.file.read_text().splitlines()] == ["a", "b", "c"]
    if note:
        assert f"Hidden rows: {note[0]}, hidden columns: {note[1]}. They are used like the others." in rows.note
    else:
        assert "idden" not in rows.note


def test_hidden_sheet_cannot_be_chosen(client):
    file = client.studio.workspace.folder / "table.xlsx"
    changes = {'sheetId="2"': 'sheetId="2" state="hidden"'}
    file.write_bytes(replace_in_archive(workbook(TABLE, TABLE), "xl/workbook.xml", changes))
    for sheet, message in {"S2": "the sheet “S2” is hidden", "S3": "the sheet “S3” does not exist"}.items():
        with pytest.raises(UserError, match=message):
            spreadsheets.convert(client.studio.workspace, file, sheet=sheet)


def test_conversion_has_no_secrets_and_exits_with_the_studio(client, monkeypatch):
    options = {}

    def run(command, **arguments):
        options.update(arguments)
        return run_command(command, **arguments)

    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setattr(spreadsheets, "run_command", run)
    file = client.studio.workspace.folder / "table.xlsx"
    file.write_bytes(workbook(TABLE))
    assert spreadsheets.convert(client.studio.workspace, file).sheet == "S1"
    assert "HF_TOKEN" not in options["environment"] and options["stdin_bytes"] is None


def test_sheet_with_entities_is_rejected(client):
    file = client.studio.workspace.folder / "table.xlsx"
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    declaration = f'<!DOCTYPE worksheet [<!ENTITY e0 "{"a" * 100}">{entities}]><worksheet'
    file.write_bytes(replace_in_archive(workbook(TABLE), "xl/s1.xml", {"<worksheet": declaration}))
    with pytest.raises(UserError, match="document type declaration"):
        spreadsheets.convert(client.studio.workspace, file)
    assert not [*client.studio.workspace.folder.glob(".*.part")]


def test_sheet_of_a_spreadsheet_can_be_chosen(pages):
    sheets = {
        "Notes": [["a", "b"], ["x", "y"]],
        "Data": [["text", "label"], *[[f"t {n}", "ab"[n % 2]] for n in range(8)]],
    }
    address = draft_of(pages, "table.ods", open_document(sheets))
    assert '<option value="Data">' in pages.get(f"{address}/data").text
    for _ in range(2):
        assert pages.post(f"{address}/sheet", data={"sheet": "Data"}).status_code == 303
    draft = stored(pages, address)
    assert (draft.rows, draft.sheet, draft.sheets) == ("table-Data.jsonl", "Data", ["Notes", "Data"])
    assert not (pages.studio.workspace.folder / "table-Data-2.jsonl").exists()
    assert "“label” the classes" in text_of(pages.get(f"{address}/part/check"))
    assert pages.post(f"{address}/sheet", data={"sheet": "hidden"}).status_code == 400
    assert "Sheet of the spreadsheet" not in pages.get(f"{draft_of(pages, 'rows.csv', 'a,b')}/data").text


UNCLEAN = ["Delivery", "Delivery", "delivery", "Delivery ", "Billing", "Billing", "billing."]


def test_almost_equal_classes_are_merged_by_a_button(pages):
    rows = "".join(f"message {n},{UNCLEAN[n % 7]}\n" for n in range(42)) + "message 99,Billling\n"
    address = draft_of(pages, "rows.csv", "text,label\n" + rows)
    shown = pages.get(f"{address}/part/check").text
    boxes = re.findall(r'name="label" value="([^"]*)"( checked)?', shown)
    assert sorted(boxes) == [("Billling", ""), *((name, " checked") for name in ("Delivery ", "billing.", "delivery"))]
    assert "data.classes" not in shown
    pages.post(f"{address}/classes", data={"label": ["delivery", "Delivery ", "billing.", "unknown"]})
    merged = {"delivery": "Delivery", "Delivery ": "Delivery", "billing.": "Billing"}
    assert stored(pages, address).settings["data"]["classes"] == merged
    shown = pages.get(f"{address}/part/check")
    assert "There are 3 classes: Billing, Billling, Delivery." in text_of(shown)
    pages.post(f"{address}/classes", data={"label": "Billling"})
    assert stored(pages, address).settings["data"]["classes"] == {**merged, "Billling": "Billing"}
    assert "Merge classes" not in pages.get(f"{address}/part/check").text
    pages.post(f"{address}/classes")  # undo
    assert "classes" not in stored(pages, address).settings["data"]


def test_changed_column_is_saved_and_read_before_the_model_is_chosen(pages):
    rows = "".join(f"message number {n},{'ab'[n % 2]},{'xyz'[n % 3]}\n" for n in range(12))
    address = draft_of(pages, "rows.csv", "message,first,second\n" + rows)
    shown = pages.get(f"{address}/part/check").text
    assert re.search(r'<form id="columns"[^>]* data-autosave data-reload="check"', shown)
    fields = {"task": "sequence-classification", "columns.text": "message", "columns.label": "first"}
    response = pages.post(f"{address}/data", data=fields, headers={"Accept": "application/json"})
    assert response.json() == {}
    assert stored(pages, address).settings["data"]["columns"] == {"text": "message", "label": "first"}
    assert pages.get(f"{address}/model").headers["location"] == f"{address}/data"
    assert "“first” the classes" in text_of(pages.get(f"{address}/part/check"))
    assert pages.get(f"{address}/model").status_code == 200


def test_tokens_link_is_beside_the_row_number(pages):
    address = draft_of(pages, "rows.csv", "text,label\n" + "a,b\n" * 3)
    assert re.search(r'<th scope="row">1 <a href="[^"]*row=1#tokens">Tokens', pages.get(f"{address}/part/rows").text)


def test_simultaneous_files_get_distinct_paths(tmp_path):
    sources = [tmp_path / f"source-{n}" for n in range(12)]
    for source in sources:
        source.write_text(source.name)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        paths = list(pool.map(lambda source: move_to_unused(source, tmp_path / "rows.csv"), sources))
    assert sorted(path.read_text() for path in paths) == sorted(source.name for source in sources)


def test_rejected_spreadsheet_is_not_kept(client):
    for address in ("/files/", "/trial/files/"):
        response = client.put(f"{address}table.xlsx", content=b"damaged", headers={"Accept": "application/json"})
        assert response.status_code == 400 and "zip" not in response.text.lower()
        assert [*client.studio.workspace.folder.iterdir()] == []
        for content in (b"\xff\xfe" * 99, b"PK\x03\x04" + bytes(50)):
            assert client.put(f"{address}table.csv", content=content).status_code == 400
            assert [*client.studio.workspace.folder.iterdir()] == []
    (client.studio.workspace.folder / "own.xls").write_bytes(b"damaged")
    assert client.post("/drafts", data={"file": "own.xls"}).status_code == 400
    assert (client.studio.workspace.folder / "own.xls").is_file()


def test_reviews_become_classes_with_settings(pages):
    address = draft_of(pages, "reviews.csv", REVIEWS + "good,\n")
    shown = text_of(pages.get(f"{address}/part/check"))
    assert "30 rows can be used." in shown
    assert "The column “review” holds the texts and “stars” the classes." in shown
    assert "There are 2 classes: bad, good." in shown
    assert "1 row cannot be used and will be left out: row 31." in shown
    assert "Rows of each class" in shown and "Length of the rows" in shown
    assert f'href="{address}/model"' in pages.get(f"{address}/data").text
    draft = stored(pages, address)
    assert draft.settings["data"] | {"max_length": 0} == {
        "train": "reviews.csv", "columns": {"text": "review", "label": "stars"}, "bad_rows": "skip",
        "eval": draft.settings["data"]["eval"], "max_length": 0,
    }  # fmt: skip
    assert draft.preview["rows"] == 30 and "output" not in draft.settings
    pages.get(f"{address}/part/check")
    assert [call for call, _ in pages.worker.calls] == ["preview", "check", "check"]


def test_findings_name_rows_by_number(pages):
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(25)]
    lines = [json.dumps(row) for row in [*rows, rows[3]]]
    lines[7] = "{broken"
    lines[9] = '{"prompt": 4, "completion": ["x"]}'
    shown = text_of(pages.get(f"{draft_of(pages, 'chat.jsonl', chr(10).join(lines))}/part/check"))
    assert "The column “prompt” holds the prompts and “completion” the answers." in shown
    assert "1 row left out: not JSON. Row 8 " in shown
    assert "earlier one (dropped). Row 26 " in shown and "23 rows can be used." in shown
    assert "1 row repeats an earlier row and will be left out." in shown
    assert str(pages.studio.workspace.folder) not in shown


def test_unknown_columns_can_be_chosen(pages):
    rows = "".join(f"Was ist {i}?,Das ist {i * i}.,x{i}\n" for i in range(12))
    address = draft_of(pages, "odd.csv", "frage,antwort,rest\n" + rows)
    page = pages.get(f"{address}/part/check")
    assert "Choose the goal and its columns below" in page.text and 'id="columns.prompt"' in page.text
    task = re.search(r'<option value="([\w-]+)" selected>generate text', page.text)[1]
    chosen = {"task": task, "columns.prompt": "frage", "columns.completion": "antwort", "columns.x": "rest"}
    assert pages.post(f"{address}/data", data=chosen).headers["location"] == f"{address}/data"
    shown = text_of(pages.get(f"{address}/part/check"))
    assert "12 rows can be used." in shown
    assert "The column “frage” holds the prompts and “antwort” the answers." in shown
    assert stored(pages, address).settings["data"]["columns"] == {"prompt": "frage", "completion": "antwort"}
    assert pages.post(f"{address}/data", data={"task": "nothing"}).status_code == 400


def test_errors_name_files_relative_to_the_folder(pages):
    folder = pages.studio.workspace.folder
    address = draft_of(pages, "reviews.csv", "\0\1" * 50)
    assert "reviews.csv" in text_of(pages.get(f"{address}/part/check"))
    draft = stored(pages, address)
    draft.settings |= {"task": CLASSES, "model": "model"}
    draft.save()
    (folder / "model" / "config.json").write_text("{")
    for path in (f"{address}/part/check", f"{address}/part/tokens?row=1", f"{address}/part/plan"):
        response = pages.get(path)
        assert 'id="error"' in response.text and str(folder) not in response.text, path


def test_new_goal_infers_columns_again(pages):
    address = draft_of(pages, "reviews.csv", REVIEWS)
    pages.get(f"{address}/part/check")
    goals = re.findall(r'<option value="([\w-]+)">(.*?)</option>', pages.get(f"{address}/part/check").text)
    task = next(task for task, goal in goals if goal == "generate text")
    pages.post(f"{address}/data", data={"task": task, "columns.text": "review", "columns.label": "stars"})
    assert stored(pages, address).settings == {"task": task, "data": {"train": "reviews.csv"}}
    pages.get(f"{address}/part/check")
    assert [values["task"] for call, values in pages.worker.calls if call == "preview"] == [None, task]


def test_lengths_are_counted_again_for_another_model(pages):
    address = draft_of(
        pages, "reviews.csv", "label,text\n" + "".join(f"c{i % 2},{'word ' * 100}{i}\n" for i in range(20))
    )
    pages.get(f"{address}/part/check")
    draft = stored(pages, address)
    assert draft.settings["data"]["max_length"] == 128 and draft.settings["data"]["long_rows"] == "cut"
    draft.settings["train"]["epochs"] = 9
    draft.preview = None
    draft.settings["model"] = str(save_model(tiny_llama(max_position_embeddings=1024), Path(pages.worker.model + "-2")))
    draft.save()
    pages.get(f"{address}/part/check")
    settings = stored(pages, address).settings
    assert settings["data"]["max_length"] == 512 and settings["train"]["epochs"] == 9


def test_rows_are_escaped_and_paged(pages):
    lines = [json.dumps({"text": f"<b>bold {i}</b>", "label": {"a": i}}) for i in range(60)]
    lines[2] = "<script>alert(1)</script>"
    address = draft_of(pages, "rows.jsonl", "\n".join(lines))
    first = pages.get(f"{address}/part/rows")
    assert "<b>" not in first.text and "<script" not in first.text
    assert "&lt;b&gt;bold 0&lt;/b&gt;" in first.text
    shown = text_of(first)
    assert '{"a": 24}' in shown and '{"a": 25}' not in shown and "Rows 1 to 25 of 60" in shown
    assert "3Cannot be read: line 3 is not JSON" in shown
    last = text_of(pages.get(f"{address}/part/rows", params={"from": 51}))
    assert '{"a": 50}' in last and "Next rows" not in last and "Previous rows" in last
    assert pages.get(f"{address}/data", params={"from": "x", "row": "-1"}).status_code == 200


def test_table_shows_first_rows_of_large_file(pages, monkeypatch):
    monkeypatch.setattr(data, "MAX_ROWS", 40)
    address = draft_of(pages, "rows.csv", "text,label\n" + "a,b\n" * 1000)
    assert "of the first 40" in text_of(pages.get(f"{address}/part/rows"))


def test_tokens_of_row(pages):
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(20)]
    address = draft_of(pages, "chat.jsonl", "\n".join(map(json.dumps, rows)))
    pages.get(f"{address}/part/check")
    shown = pages.get(f"{address}/part/tokens", params={"row": 3}).text
    assert re.search(r"Question 2\?.*<mark>.*Answer 2\.", shown, re.DOTALL)
    beyond = pages.get(f"{address}/part/tokens", params={"row": 99})
    assert beyond.status_code == 200 and 'id="error"' in beyond.text and "<main" not in beyond.text


def test_running_call_is_reported_as_pending(pages):
    address = draft_of(pages, "reviews.csv", REVIEWS)
    run = pages.worker.result
    slow = {"preview"}
    pages.studio.worker.result = lambda call, values, **_: Pending(7.2) if call in slow else run(call, values)
    response = pages.get(f"{address}/part/check")
    assert response.status_code == 202 and "Reading the rows, 7 s" in response.text
    slow.symmetric_difference_update({"preview", "check"})
    response = pages.get(f"{address}/part/check")
    assert response.status_code == 202 and "30 rows can be used" in response.text
    assert "Checking all rows, 7 s" in response.text
    pages.studio.worker.result = lambda call, values, **_: Pending(0.0) if call in slow else run(call, values)
    assert "Checking all rows …" in pages.get(f"{address}/part/check").text


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\x01\x02\xff" * 100, b"text,label\n", b"PK\x03\x04" + bytes(50)],
    ids=["empty", "binary", "only titles", "zip"],
)
def test_unreadable_file_is_an_error_part(pages, content):
    (pages.studio.workspace.folder / "rows.csv").write_bytes(content)
    address = pages.post("/drafts", data={"file": "rows.csv"}).headers["location"].removesuffix("/data")
    response = pages.get(f"{address}/part/check")
    assert response.status_code == 200 and 'id="error"' in response.text and "<select" not in response.text
    assert '<a class="button" href="/">Choose another file' in response.text
    assert f'href="{address}/model"' not in pages.get(f"{address}/data").text
    assert pages.get(f"{address}/part/rows").status_code == 200


def test_missing_model_is_not_downloaded():
    from deltaw.settings import task_registry

    task = task_registry.default_task()
    config = {"model": "pypi:no-such-package==1.0", "task": task, "data": {"train": "rows.csv"}}
    unavailable = {"unavailable": "pypi:no-such-package==1.0"}
    assert row_calls.check(config) == row_calls.rows(config, 1, 1) == unavailable


def test_excel_file_becomes_json_lines(pages):
    rows = [["text", " label ", "when", ""], ["ä <b>", 1, (45000,), ""], ["", "", "", ""], ["b", 2.5, (45001.5,), ""]]
    address = draft_of(pages, "table.xlsx", workbook([], rows, [["other"]]))
    folder = pages.studio.workspace.folder
    lines = (folder / "table.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == [
        {"text": "ä <b>", "label": 1, "when": "2023-03-15"},
        {"text": "b", "label": 2.5, "when": "2023-03-16T12:00:00"},
    ]
    assert stored(pages, address).rows == "table.jsonl"
    pages.post("/drafts", data={"file": "table.xlsx"})
    assert not (folder / "table-2.jsonl").exists()
    (folder / "table.jsonl").write_text("{}")
    pages.post("/drafts", data={"file": "table.xlsx"})
    assert (folder / "table.jsonl").read_text() == "{}" and (folder / "table-2.jsonl").is_file()


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ([["title", ""], ["a", "b"]], "column 2 has no title"),
        ([["a", "a"], ["1", "2"]], "two columns have the title 'a'"),
        ([["a", "b"]], "no sheet with titles"),
        ([], "no sheet with titles"),
    ],
    ids=["merged", "repeated", "only titles", "empty"],
)
def test_excel_file_without_table_is_rejected(client, sheet, message):
    file = client.studio.workspace.folder / "table.xlsx"
    file.write_bytes(workbook(sheet))
    with pytest.raises(UserError, match=message):
        spreadsheets.convert(client.studio.workspace, file)
    assert not [*client.studio.workspace.folder.glob(".*.part")]


def test_damaged_and_large_excel_files_are_rejected(client):
    file = client.studio.workspace.folder / "table.xlsx"
    for content in (b"PK\x03\x04 damaged", b"text", workbook([["a"], ["b"]])[:300], XLS):
        file.write_bytes(content)
        with pytest.raises(UserError, match="damaged, protected with a password, or not a spreadsheet"):
            spreadsheets.convert(client.studio.workspace, file)
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("xl/workbook.xml", "w") as entry,
    ):
        for _ in range(1001):
            entry.write(bytes(10**6))
    with pytest.raises(UserError, match="too large when it is unpacked"):
        spreadsheets.convert(client.studio.workspace, file)


def test_spreadsheet_is_not_converted_if_the_disk_is_almost_full(tmp_path, monkeypatch, capsys) -> None:
    source = tmp_path / "d.xlsx"
    source.write_bytes(workbook([["text"], ["a"]]))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("resource.setrlimit", lambda *limits: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=spreadsheets.MIN_FREE_BYTES))
    with pytest.raises(SystemExit):
        spreadsheets.main(str(source), str(tmp_path / "d.jsonl"))
    assert "the disk is almost full" in capsys.readouterr().out and not (tmp_path / "d.jsonl").exists()
