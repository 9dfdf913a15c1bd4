"""Rewards computed by other programs: a judge, a reward model, math-verify and reasoning-gym."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from deltaw.data.sources import read_rows
from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.tasks.reward.rewards import load_reward
from deltaw.tasks.reward.rewards.functions import Completion
from deltaw.tasks.reward.rewards.judge import judge, score_in
from deltaw.tasks.reward.rewards.rewarder import Rewarder
from deltaw.tasks.reward.settings import RewardFunction
from tests.conftest import COLORS, refusal, write_rows
from tests.training.runs import load_eval_rows, open_on_cpu


def completion_of(text: str, answer: str | None = None, row: int = 1, **columns: object) -> Completion:
    return Completion("asked", text, answer, row, columns)


def settings_of(name: str, **options: object) -> RewardFunction:
    return RewardFunction.model_validate({"name": name, **options})


def compute_rewards(settings: RewardFunction, completions: list[Completion]) -> list[float]:
    with closing(Rewarder(settings)) as rewarder:
        return rewarder(completions)


class _JudgeHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((self.path, self.headers.get("Authorization"), request))
        status, text = server.reply(request["messages"][0]["content"], len(server.requests))
        body = text if status != 200 else json.dumps({"choices": [{"message": {"content": text}}]})
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        return


@pytest.fixture
def judge_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _JudgeHandler)
    server.requests = []
    server.reply = None
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def score(reply, completions, **options):
        server.reply = reply
        url = f"http://127.0.0.1:{server.server_port}/v1"
        return judge(settings_of("judge", url=url, model="m", **options), completions)

    yield server, score
    server.shutdown()
    server.server_close()


def test_judge_score_is_normalized_by_scale(judge_server):
    server, score = judge_server
    template = "{prompt} | {completion} | {answer} | {other}"
    completions = [completion_of("7 {answer}", "gold"), completion_of("none", row=5), completion_of("11")]
    reply = lambda content, count: (200, "no idea" if "none" in content else f"I say {content.split()[2]}")  # noqa: E731
    assert score(reply, completions[:1], template=template) == [0.7]
    assert score(reply, completions[:1], template=template, scale=[5, 9]) == [0.5]
    path, key, request = server.requests[0]
    assert path == "/v1/chat/completions" and key is None and request["model"] == "m" and request["temperature"] == 0
    assert any(r["messages"][0]["content"] == "asked | 7 {answer} | gold | {other}" for *_, r in server.requests)
    with pytest.raises(UserError, match="row 5 no score: it gives no clear number from 0 to 10: it says 'no idea'"):
        score(reply, completions[1:2], retries=0)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        *[(text, 3) for text in ("3", "3/10", "3 of 10", "**3/10**", "Score: 3", '{"score": 3, "errors": 2}', "3,0")],
        *[(text, 8) for text in ("8 out of 10", "4/5", "80%", "8.", "8 - it has no faults", "Rating (0-10): 8/10")],
        ("It has 2 faults in 10 lines.\n\n7", 7),
        ("On a scale from 0 to 10, I give 7", 7),
        ("7/10, since 3 of 4 points are right", 7),
        ("<think>2? 3? 4?</think>\nFinal score: 7", 7),
        ("Score: 3 at first. Final score: 7", 7),
        ("1. It is right.\n2. It is short.\nScore: 8", 8),
        ("9,5", 9.5),
        *[(text, None) for text in ("", "no idea", "11", "-1", "6 or 7", "8-9", "1. Right\n2. Short", "<think>5")],
        ("Score for style: 3\nScore for content: 8", None),
        *[(text, None) for text in ("Score: 10/10? No, 2/10", "Score: 7-8", "Rating: 3 - 4")],
        ("Score: 8. Lines 3-4 are not clear.", 8),
    ],
)
def test_score_is_parsed_by_scale(text, score):
    assert score_in(text, 0, 10) == score


def test_fraction_of_other_scale_is_converted_or_rejected():
    assert score_in("3/10", 0, 1) == pytest.approx(0.3) and score_in("3/5", 1, 5) == 3
    assert score_in("3/10", 1, 5) is None and score_in("1,500", 0, 2000) == 1500 and score_in("-3", -5, 5) == -3


def test_unclear_reply_is_retried_then_reported_with_row(judge_server):
    server, score = judge_server
    assert score(lambda content, count: (200, "6 or 7" if count < 3 else "6"), [completion_of("x")]) == [0.6]
    server.requests.clear()
    with pytest.raises(UserError, match=r"row 4 no score.*'6 or 7'"):
        score(lambda content, count: (200, "6 or 7"), [completion_of("x", row=4)], retries=1)
    assert len(server.requests) == 2


_REPLY = json.dumps({"choices": [{"message": {"content": "7"}}]}).encode()
_HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"


_BROKEN = {"nothing": b"", "status": b"nonsense\r\n\r\n", "cut": _HEAD % len(_REPLY) + _REPLY[:20]}
_BROKEN |= {"short": _HEAD % 20 + _REPLY, "null": _HEAD % 4 + b"null", "choices": _HEAD % 15 + b'{"choices": []}'}
_BROKEN["chunk"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n" + _REPLY
_BROKEN["error"] = b"HTTP/1.1 500 no\r\nContent-Length: 99\r\n\r\nbusy"


@pytest.mark.parametrize("name", _BROKEN)
def test_broken_judge_response_is_retried(name):
    broken = _BROKEN[name]
    answers = [broken, _HEAD % len(_REPLY) + _REPLY]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for answer in [*answers, broken, broken]:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        settings = settings_of("judge", url=f"http://127.0.0.1:{server.getsockname()[1]}", model="m", retries=1)
        assert judge(settings, [completion_of("x")]) == [0.7]
        refusal(judge, settings, [completion_of("x", row=6)], match="row 6 no score")


@pytest.mark.parametrize("ending", ["\r\n", "\n", "\r", " ", "\t", "\0", "ü", "\r\nX-Other: 1"])
def test_invalid_key_is_rejected_and_never_printed(ending, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "JUDGE": f"quite-long-key-1234{ending}"})
    with pytest.raises(UserError, match="the key in JUDGE") as error:
        judge(settings_of("judge", url="http://127.0.0.1:9", model="m", key_from="JUDGE"), [completion_of("x")])
    assert "quite-long" not in str(error.value)
    address = "https://me:pass@host/v1?key=quite-long-key-1234"
    for text in ("b'Bearer quite-long-key-1234\\r'", "quite-long-key-1", address):
        assert not any(word in str(UserError(text)) for word in ("quite", "1234", "pass")), text
    for text in ("https://host/v1?mail=me@host", "://a b@c", 'see "http://", not "x@y"'):
        assert str(UserError(text)) == text


EXTERNAL = [{"$ref": "http://127.0.0.1:9/schema.json"}, {"$ref": "file:///etc/hostname"}]
EXTERNAL += [{"$defs": {"a": {"items": [{"$ref": "other.json#/a"}]}}}, {"$dynamicRef": "https://example.org/schema#a"}]
EXTERNAL += [{"$id": "http://example.org/schemas/", "properties": {"a": {"$ref": "next"}}}]


@pytest.mark.parametrize("schema", EXTERNAL)
def test_schema_with_external_reference_is_rejected(schema, tmp_path):
    refusal(settings_of, "json-schema", schema=schema, match="not fetched")
    pytest.importorskip("jsonschema", reason="the extra reward is not installed")
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    refusal(load_reward(settings_of("json-schema", schema=str(file))), [completion_of("{}")], match="not fetched")


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"$ref": "#/$defs/none"}, {"$defs": {"a": {"$ref": "#/$defs/a"}}}])
def test_schema_with_unresolvable_reference_is_rejected(schema):
    pytest.importorskip("jsonschema", reason="the extra reward is not installed")
    schema = {**schema, "$ref": schema.get("$ref", "#/$defs/a")}
    with pytest.raises(UserError, match="unresolvable or circular reference"):
        load_reward(settings_of("json-schema", schema=schema))([completion_of("{}")])


def test_completion_that_cannot_be_validated_scores_half():
    pytest.importorskip("jsonschema", reason="the extra reward is not installed")
    schema = {"properties": {"a": {"multipleOf": 0.5}, "b": {"$ref": "#"}}}
    deep = '{"b":' * 900 + "1" + "}" * 900
    reward = load_reward(settings_of("json-schema", schema=schema))
    assert reward([completion_of('{"a": Infinity}'), completion_of(deep), completion_of('{"a": 1}')]) == [0.0, 0.5, 1.0]
    assert load_reward(settings_of("json-schema", schema={"type": "null"}))([completion_of("null")]) == [1.0]


def test_schema_may_reference_itself_and_must_be_valid():
    pytest.importorskip("jsonschema", reason="the extra reward is not installed")
    inner = {"$defs": {"n": {"type": "integer"}, "b": {"$id": "b.json"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    inner["properties"] |= {"b": {"$ref": "b.json"}, "c": {"$ref": "https://json-schema.org/draft/2020-12/schema"}}
    reward = load_reward(settings_of("json-schema", schema=inner))
    texts = ('{"a": 1, "b": 2, "c": {}}', '{"a": "1"}', '{"c": {"type": 5}}')
    assert reward([completion_of(text) for text in texts]) == [1, 0.5, 0.5]
    with pytest.raises(UserError, match=r"not valid at \$.type"):
        load_reward(settings_of("json-schema", schema={"type": "objekt"}))([completion_of("{}")])
    unknown = {"$ref": "https://json-schema.org/draft/unknown"}
    error = refusal(compute_rewards, settings_of("json-schema", schema=unknown), [completion_of("{}", row=3)])
    assert "Unresolvable: https://json-schema.org/draft/unknown" in error.message


def test_failing_judge_is_retried_then_reported_without_key(judge_server, monkeypatch):
    server, score = judge_server
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    options = {"key_from": "JUDGE_KEY", "retries": 1}
    busy_once = lambda content, count: (503, "busy") if count == 1 else (200, "5")  # noqa: E731
    assert score(busy_once, [completion_of("x")], **options) == [0.5]
    assert [key for _, key, _ in server.requests] == ["Bearer sk-secret"] * 2
    server.requests.clear()
    with pytest.raises(UserError, match="row 3 no score: status 401: wrong key …") as error:
        score(lambda content, count: (401, "wrong key sk-secret"), [completion_of("x", row=3)], **options)
    assert "sk-secret" not in str(error.value) and len(server.requests) == 1
    with pytest.raises(UserError, match="status 302"):  # a redirect would send the key to another host
        score(lambda content, count: (302, ""), [completion_of("x")], **options)
    with pytest.raises(UserError, match="NO_KEY is not set"):
        score(lambda content, count: (200, "5"), [completion_of("x")], key_from="NO_KEY")
    waited = threading.Event()
    late = lambda content, count: (waited.wait(120), (200, "5"))[1]  # noqa: E731
    try:
        refusal(score, late, [completion_of("x")], seconds=1, match="row 1 no score")
    finally:
        waited.set()


@pytest.mark.slow
def test_reward_model_scores_match_its_evaluation(settings, tmp_path):
    rows = [{"prompt": f"paint it {c}", "chosen": c[0] * 3, "rejected": c[1:3] + "!"} for c in COLORS]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    changes = {"task": "sequence-classification", "data": {"train": str(path), "eval": 3}}
    output = fit(settings(tmp_path / "run", **changes, train={"epochs": 1})).output
    run = open_on_cpu(output)
    pairs = load_eval_rows(run)
    expected = run.score(pairs).evaluation.predictions
    numbers = [(pair.rows[0].row, column) for pair in pairs for column in ("chosen", "rejected")]
    completions = [completion_of(rows[n - 1][column], row=n, prompt=rows[n - 1]["prompt"]) for n, column in numbers]
    completions.append(completion_of("  ", prompt="paint it"))
    rewards = compute_rewards(settings_of("model", model=str(output), seconds=60), completions)
    assert rewards[:-1] == pytest.approx(np.ravel(expected).tolist(), abs=1e-5) and rewards[-1] == 0
    assert np.ptp(rewards[:-1]) > 1e-3


@pytest.mark.slow
def test_model_that_is_not_a_reward_model_is_rejected(model_folder):
    with pytest.raises(UserError, match="is not a reward model"):
        compute_rewards(settings_of("model", model=str(model_folder), seconds=60), [completion_of("x", prompt="y")])


def test_math_answers_are_compared_by_value():
    pytest.importorskip("math_verify", reason="the extra reward is not installed")
    pairs = [
        ("so it is $\\boxed{\\frac{1}{2}}$", "0.5"),
        ("the answer is $2\\sqrt{2}$", "\\sqrt{8}"),
        ("it is 13", "12"),
    ]
    completions = [completion_of(*pair) for pair in [*pairs, ("", "12"), ("12",)]]
    assert compute_rewards(settings_of("math"), completions) == [1, 1, 0, 0, 0]


def test_reasoning_gym_problems_are_scored_from_rows():
    pytest.importorskip("reasoning_gym", reason="the extra reward is not installed")
    rows = [row for _, row in read_rows("reasoning-gym:leg_counting?size=3&seed=4")]
    answers = [(row["answer"], row) for row in rows]
    answers += [("<answer>1</answer>", rows[0]), (f"I think <answer> {rows[0]['answer']} </answer>", rows[0])]
    completions = [completion_of(text, row["answer"], metadata=row["metadata"]) for text, row in answers]
    rewards = compute_rewards(settings_of("reasoning-gym"), completions)
    assert rewards[:3] == [1, 1, 1] and rewards[3] < 0.5 and rewards[4] == 1
    refusal(compute_rewards, settings_of("reasoning-gym"), [completion_of("1", "1")], match="row 1 has no metadata")


@pytest.mark.parametrize("name", ["math", "reasoning-gym", "json-schema"])
def test_missing_package_is_reported_with_extra(name, monkeypatch):
    for module in ("math_verify", "reasoning_gym", "jsonschema"):
        monkeypatch.setitem(sys.modules, module, None)
    options = {"schema": {}} if name == "json-schema" else {}
    with pytest.raises(UserError, match="cannot be imported") as error:
        load_reward(settings_of(name, **options))([completion_of("1", "1", metadata={"source_dataset": "chain_sum"})])
    assert "deltaw[reward]" in str(error.value.hint)


def test_settings_are_checked_and_saved_per_function():
    refusal(settings_of, "exact", pattern="a", match="'exact' has no setting 'pattern'")
    refusal(settings_of, "judge", url="http://localhost", match="'judge' needs 'model'")
    with pytest.raises(ValueError, match="url"):
        settings_of("judge", url="file:///etc/passwd", model="m")
    refusal(settings_of, "judge", url="http://localhost", model="m", scale=[1, 1], match="scale is empty")
    function = settings_of("json-schema", schema={"type": "object"}, weight=2)
    saved = function.model_dump()
    assert set(saved) == {"name", "weight", "seconds", "schema_"} and RewardFunction.model_validate(saved) == function
