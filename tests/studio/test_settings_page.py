"""Page of the settings: fields of the schema, errors at their fields, settings file and command."""

from __future__ import annotations

import html
import re
import shlex

import pytest
import yaml

pytest.importorskip("fastapi", reason="the extra studio is not installed")
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import RunConfig, flat, parse_setting, settings
from deltaw.studio.settings import ELSEWHERE, FOUR

JSON = {"Accept": "application/json"}
CLASSES = next(entry.name for entry in task_registry.entries() if entry.serves == "classes")


@pytest.fixture
def address(client) -> str:
    return new_draft(client, task_registry.default_task())


def new_draft(client, task: str) -> str:
    """Return the address of the settings of a draft with a task and a model."""
    workspace = client.studio.workspace
    (workspace.folder / "my rows.csv").write_text("text,label\na,b\n")
    draft = workspace.create_draft(workspace.folder / "my rows.csv")
    draft.settings |= {"task": task, "model": "owner/model", "train": {"epochs": 3}}
    draft.save()
    return f"/drafts/{draft.identity}/settings"


def stored(client, address: str) -> dict:
    return client.studio.workspace.draft(address.split("/")[2]).settings


def ids_of_fields(page: str) -> list[str]:
    return re.findall(r"<(?:input|select|textarea)[^>]* id=\"([\w.]+)\"", page)


@pytest.mark.parametrize("task", task_registry.names())
def test_each_setting_has_a_labeled_field(client, task):
    page = client.get(new_draft(client, task)).text
    sections = {
        "data",
        "train",
        task_registry.entry_of(task).section_name,
        *(m.name for m in method_registry.entries()),
    }
    keys = {s.key for s in settings() if "." not in s.key or s.key.partition(".")[0] in sections} - {*ELSEWHERE}
    fields = ids_of_fields(page)
    if not task_registry.entry_of(task).generates_text:
        keys.remove("train.keep_general")
    assert {*fields} - {"run-name"} == keys and len(fields) == len({*fields})
    for setting in settings():
        if setting.key in keys:
            assert f'<label for="{setting.key}">' in page
            words = FOUR[setting.key][1] if setting.key in FOUR else setting.description
            assert html.escape(words[1:], quote=False)[:20] in page.replace("&#39;", "'").replace("&#34;", '"')
    assert re.search(r'id="train.epochs"[^>]*', page) and 'value="3"' in page


def test_four_settings_come_first(client, address):
    first = client.get(address).text.partition('id="advanced"')[0]
    assert ids_of_fields(first) == [*FOUR]
    assert ids_of_fields(client.get(new_draft(client, CLASSES)).text.partition('id="advanced"')[0]) == [
        key for key in FOUR if key != "train.keep_general"
    ]


def test_number_with_thousands_of_digits_is_an_error_at_its_field(client, address):
    answer = client.post(address, data={"train.epochs": "0x" + "f" * 5000}, headers=JSON)
    assert answer.status_code == 200 and "number is too long" in answer.json()["errors"]["train.epochs"]


def test_saved_settings_agree_with_file_and_command(client, address):
    fields = {"train.epochs": "2.5", "train.learning_rate": "1e-4", "lora.rank": "16", "train.max_grad_norm": "null"}
    fields |= {"data.system": "Be kind: it's\r\nfree", "data.columns": "{prompt: a b}", "data.eval": ""}
    fields |= {"train.betas": "[0.9, 0.999]", "data.group": "'7'", "train.checkpointing": "true"}
    answer = client.post(address, data=fields, headers=JSON).json()
    assert answer["errors"] == {}
    expected = {
        "data": {
            "train": "my rows.csv", "system": "Be kind: it's\nfree", "columns": {"prompt": "a b"}, "group": "7"
        },
        "task": task_registry.default_task(),
        "model": "owner/model",
        "train": {"epochs": 2.5, "learning_rate": 1e-4, "max_grad_norm": None, "checkpointing": True},
    }  # fmt: skip
    assert stored(client, address) == yaml.safe_load(answer["yaml"]) == expected
    words = shlex.split(answer["command"])
    keys = [word.removeprefix("--") for word in words[2::2]]
    texts = words[3::2]
    values = {key: parse_setting(key, text) for key, text in zip(keys, texts, strict=True)}
    assert words[:2] == ["deltaw", "train"] and values == flat(expected)
    assert RunConfig.read(expected).train.max_grad_norm is None


def test_values_of_yaml_that_are_not_json_are_texts(client, address):
    fields = {"data.date": "2026-01-31", "data.columns": "{prompt: 2026-01-31}"}
    assert client.post(address, data=fields, headers=JSON).json()["errors"] == {}
    assert stored(client, address)["data"] | {"train": ""} == {
        "train": "", "date": "2026-01-31", "columns": {"prompt": "2026-01-31"}
    }  # fmt: skip
    assert client.get(address).status_code == 200
    assert client.post(address, data={"data.columns": "{2026-01-31: a, b: !!set {c}}"}).status_code == 400


def test_page_shows_saved_values(client, address):
    fields = {"data.group": "'7'", "train.schedule": "cosine", "data.columns": "{prompt: q}", "train.epochs": "2"}
    assert client.post(address, data=fields).headers["location"] == address
    page = client.get(address).text
    sent = {
        name: re.search(f'value="([^"]*)"[^>]* id="{re.escape(name)}"', page)[1] for name in fields if "sch" not in name
    }
    assert {name: html.unescape(text) for name, text in sent.items()} == {
        "data.group": "'7'", "data.columns": "{prompt: q}", "train.epochs": "2"
    }  # fmt: skip
    assert '<option value="cosine" selected>' in page
    assert client.post(address, data={"train.epochs": "1"}).status_code == 303
    assert "epochs" not in stored(client, address).get("train", {})  # the default


def test_errors_are_at_their_fields(client, address):
    before = stored(client, address)
    fields = {"train.epochs": "-1", "data.rows": "<b>", "train.batch_size": "7"}
    errors = client.post(address, data=fields, headers=JSON).json()["errors"]
    assert errors.keys() == {"train.epochs", "data.rows", "form"}
    assert "greater than 0" in errors["train.epochs"] and "greater" not in errors["data.rows"]
    response = client.post(address, data=fields)
    assert response.status_code == 400 and stored(client, address) == before
    epochs = re.search(r'<input[^>]*id="train.epochs"[^>]*>', response.text)[0]
    assert 'aria-invalid="true"' in epochs and "train.epochs-error" in epochs and 'value="-1"' in epochs
    assert '<p class="error" id="data.rows-error">' in response.text and "<b>" not in response.text
    assert 'value="7"' in response.text
    for key, text in {"lora.rank": "many", "data.date": "7", "data.template": "none"}.items():
        errors = client.post(address, data={key: text, "train.seed": "1"}, headers=JSON).json()["errors"]
        assert errors.keys() == {key, "form"}


@pytest.mark.parametrize(
    "fields",
    [
        {"trust_remote_code": "true"}, {"track": "wandb"}, {"force": "true"}, {"output": "/tmp/x"}, {"other.key": "1"},
        {"data.chat_template": "/etc/passwd"}, {"start_from": "../x"}, {"data.eval": "/etc/passwd"},
    ],
    ids=str,
)  # fmt: skip
def test_forbidden_values_are_refused(client, address, fields):
    before = stored(client, address)
    assert client.post(address, data=fields, headers=JSON).json()["errors"]
    assert stored(client, address) == before


def test_draft_without_task_or_model_leads_to_its_step(client):
    workspace = client.studio.workspace
    (workspace.folder / "rows.csv").write_text("text,label\na,b\n")
    draft = workspace.create_draft(workspace.folder / "rows.csv")
    assert client.get(f"/drafts/{draft.identity}/settings").headers["location"].endswith("/data")
    draft.settings["task"] = CLASSES
    draft.save()
    assert client.get(f"/drafts/{draft.identity}/settings").headers["location"].endswith("/model")
