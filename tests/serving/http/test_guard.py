"""Tests of access control: keys, host names, origins, and the folder for adapters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deltaw.errors import UserError
from deltaw.serving.http.settings import ServerSettings
from tests.serving.http.api_requests import CHAT, COMPLETIONS, GOOD, expect_error, load, unload

KEY = "correct-horse-1"
OTHER = "correct-horse-2"
PAGE = "https://page.example"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_required_except_for_probes(start):
    server = start(keys=(KEY, OTHER))
    for path in ("/health", "/ready"):
        assert server.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/models/base", "/nothing", "//health"):
        response = server.get(path)
        assert expect_error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    invalid = [f"Bearer {key}" for key in (KEY[:-1], KEY + "1", KEY.upper(), f"{KEY} {OTHER}", "ü" * 12)]
    for value in (*invalid, KEY):
        expect_error(server.post(CHAT, json=GOOD, headers=[(b"Authorization", value.encode())]), 401)
    for valid in (KEY, OTHER):
        assert server.post(CHAT, json=GOOD, headers=bearer(valid)).status_code == 200
    assert len(server.engine.submitted) == 2


def test_prefix_cache_is_separate_per_key(start):
    two_keys = {"keys": (KEY, OTHER)}
    for settings, owners in (two_keys, (1, 2)), (two_keys | {"share_cache": True}, (0, 0)), ({"keys": (KEY,)}, (0, 0)):
        server = start(**settings)
        for key in (KEY, settings["keys"][-1], KEY):
            for path, body in (CHAT, GOOD), (COMPLETIONS, {"model": "base", "prompt": "a"}):
                assert server.post(path, json=body, headers=bearer(key)).status_code == 200
        first, second = owners
        assert [request.owner for request in server.engine.submitted] == [first, first, second, second, first, first]


def test_unknown_host_names_are_rejected(start):
    server = start(hosts=("models.example",))
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "127.0.0.1:80/health?",
        "[::1]/health?",
        "[::1%/health?]",
        "[::1]x:80",
        "localhost:80@evil.example",
    ):
        assert expect_error(server.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000", "models.example:8000"):
        assert server.get("/v1/models", headers={"Host": host}).status_code == 200


def test_cross_origin_requests_require_configuration(shared, start):
    allowed = "access-control-allow-origin"
    method = "Access-Control-Request-Method"
    preflight = {"Origin": PAGE, method: "POST", "Access-Control-Request-Headers": "content-type"}
    assert shared.http.options(CHAT, headers=preflight).status_code == 405
    assert allowed not in shared.get("/v1/models", headers={"Origin": PAGE}).headers
    permissive = start(origins=(PAGE,), keys=(KEY,))
    assert permissive.http.options(CHAT, headers=preflight).headers[allowed] == PAGE
    other = preflight | {"Origin": "https://evil.example"}
    assert allowed not in permissive.http.options(CHAT, headers=other).headers
    expect_error(permissive.post(CHAT, json=GOOD, headers={"Origin": PAGE}), 401)


def test_responses_contain_security_headers(shared):
    for response in (shared.get("/v1/models"), shared.get("/nothing"), shared.post(CHAT, json=GOOD)):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["cache-control"] == "no-store" and response.headers["x-request-id"]
        assert "server" not in response.headers


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Folder with adapters, next to folders that clients must not access."""
    root = tmp_path / "adapters"
    for folder in (root / "poet", root / "deep" / "clerk", tmp_path / "private", tmp_path / "adapters-too"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (root / "empty").mkdir()
    for name, target in (("inside", root / "poet"), ("outside", tmp_path / "private"), ("loop", root / "loop")):
        (root / name).symlink_to(target)
    return root


def test_adapters_are_loaded_and_unloaded(start, adapters):
    server = start("fixed", adapters_from=adapters)
    expect_error(server.post(CHAT, json=GOOD | {"model": "poet"}), 404)
    paths = {"poet": "poet", "other": str(adapters / "poet"), "clerk.v2": "deep/clerk", "link": "inside"}
    for name, path in (paths | {"dots": "deep/../poet"}).items():
        response = load(server, name, path)
        assert response.status_code == 200 and name in response.text
    assert server.post(CHAT, json=GOOD | {"model": "clerk.v2"}).status_code == 200
    folders = server.served.adapter_store.folders
    assert folders["link"] == folders["poet"] == Path(os.path.realpath(adapters)) / "poet"
    assert "taken" in expect_error(load(server, "poet"), 400)["message"]
    assert unload(server, "poet").status_code == 200
    expect_error(server.post(CHAT, json=GOOD | {"model": "poet"}), 404)
    expect_error(unload(server, "poet"), 404)


def test_outside_paths_and_invalid_names_are_rejected(start, adapters):
    server = start(adapters_from=adapters)
    paths = ["..", ".", "/", "../private", "poet/../../private", "../adapters-too", "outside", "loop", "missing"]
    paths += ["poet/adapter_config.json", "poet\x00", "poet\n", "~", "file:///etc", "/proc/self", "a" * 1024]
    for path in paths:
        assert str(adapters.parent) not in expect_error(load(server, "a", path), 404)["message"]
    for name in ("", "a/b", "../a", ".a", "a b", "ä", "a" * 129, "base", 'a"} 1\n', 5, None):
        expect_error(load(server, name), 400)
    error = expect_error(load(server, "a", "empty"), 400)
    assert "not an adapter" in error["message"] and str(adapters) not in error["message"]
    expect_error(server.post("/v1/load_lora_adapter", json={"lora_name": "a"}), 400)
    expect_error(load(server, "a", base_model_name="x"), 400)
    assert server.engine.names == []


def test_number_of_adapters_is_limited(start, adapters):
    server = start("fixed", adapters_from=adapters, max_adapters=2)
    assert load(server, "a").status_code == 200
    assert "2 adapters are loaded, the maximum is 2" in expect_error(load(server, "b"), 400)["message"]
    for answer in (load(server, "a", load_inplace=True), unload(server, "a"), load(server, "b")):
        assert answer.status_code == 200


def test_unsafe_settings_are_rejected(tmp_path):
    ServerSettings(host="0.0.0.0", keys=(KEY,)).check()
    ServerSettings(host="0.0.0.0").check(without_key=True)
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"):
        ServerSettings(host=host).check()
    invalid = [({"keys": (key,)}, "API key") for key in ("short", "with a space in it", "schlüssel-lang")]
    invalid += [
        ({"host": "0.0.0.0"}, "accepts other machines"),
        ({"adapters_from": tmp_path / "none"}, "no such folder"),
    ]
    for settings, message in (*invalid, ({"certificate": tmp_path}, "TLS")):
        with pytest.raises(UserError, match=message):
            ServerSettings(**settings).check()
