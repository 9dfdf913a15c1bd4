"""Who may ask: keys, host names, other origins, and the folder that adapters come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deltaw.errors import UserError
from deltaw.serving.http.settings import ServerSettings
from tests.serving.http.asking import CHAT, COMPLETIONS, GOOD, load, refusal, unload

KEY, OTHER = "correct-horse-1", "correct-horse-2"
PAGE = "https://page.example"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_asked_for_everywhere_but_at_the_probes(start):
    server = start(keys=(KEY, OTHER))
    for path in ("/health", "/ready"):
        assert server.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/models/base", "/nothing", "//health"):
        response = server.get(path)
        assert refusal(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    wrong = [f"Bearer {key}" for key in (KEY[:-1], KEY + "1", KEY.upper(), f"{KEY} {OTHER}", "ü" * 12)]
    for value in (*wrong, KEY):
        refusal(server.post(CHAT, json=GOOD, headers=[(b"Authorization", value.encode())]), 401)
    for right in (KEY, OTHER):
        assert server.post(CHAT, json=GOOD, headers=bearer(right)).status_code == 200
    assert len(server.engine.submitted) == 2


def test_each_key_has_computed_prompts_of_its_own(start):
    two = {"keys": (KEY, OTHER)}
    for settings, owners in (two, (1, 2)), (two | {"share_cache": True}, (0, 0)), ({"keys": (KEY,)}, (0, 0)):
        server = start(**settings)
        for key in (KEY, settings["keys"][-1], KEY):
            for path, asked in (CHAT, GOOD), (COMPLETIONS, {"model": "base", "prompt": "a"}):
                assert server.post(path, json=asked, headers=bearer(key)).status_code == 200
        one, other = owners
        assert [request.owner for request in server.engine.submitted] == [one, one, other, other, one, one]


def test_names_that_others_made_point_here_are_refused(start):
    server = start(hosts=("models.example",))
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert refusal(server.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000", "models.example:8000"):
        assert server.get("/v1/models", headers={"Host": host}).status_code == 200


def test_other_origins_are_off_unless_named(shared, start):
    allowed, method = "access-control-allow-origin", "Access-Control-Request-Method"
    preflight = {"Origin": PAGE, method: "POST", "Access-Control-Request-Headers": "content-type"}
    assert shared.http.options(CHAT, headers=preflight).status_code == 405
    assert allowed not in shared.get("/v1/models", headers={"Origin": PAGE}).headers
    opened = start(origins=(PAGE,), keys=(KEY,))
    assert opened.http.options(CHAT, headers=preflight).headers[allowed] == PAGE
    other = preflight | {"Origin": "https://evil.example"}
    assert allowed not in opened.http.options(CHAT, headers=other).headers
    refusal(opened.post(CHAT, json=GOOD, headers={"Origin": PAGE}), 401)


def test_answers_carry_the_headers_that_browsers_heed(shared):
    for response in (shared.get("/v1/models"), shared.get("/nothing"), shared.post(CHAT, json=GOOD)):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["cache-control"] == "no-store" and response.headers["x-request-id"]
        assert "server" not in response.headers


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder with adapters, and things beside it that are none of a client's business."""
    root = tmp_path / "adapters"
    for place in (root / "poet", root / "deep" / "clerk", tmp_path / "private", tmp_path / "adapters-too"):
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text("{}")
    (root / "empty").mkdir()
    for name, target in (("inside", root / "poet"), ("outside", tmp_path / "private"), ("loop", root / "loop")):
        (root / name).symlink_to(target)
    return root


def test_adapters_are_loaded_and_unloaded(start, adapters):
    server = start("fixed", adapters_from=adapters)
    refusal(server.post(CHAT, json=GOOD | {"model": "poet"}), 404)
    paths = {"poet": "poet", "other": str(adapters / "poet"), "clerk.v2": "deep/clerk", "link": "inside"}
    for name, path in (paths | {"dots": "deep/../poet"}).items():
        response = load(server, name, path)
        assert response.status_code == 200 and name in response.text
    assert server.post(CHAT, json=GOOD | {"model": "clerk.v2"}).status_code == 200
    folders = server.served.shelf.folders
    assert folders["link"] == folders["poet"] == Path(os.path.realpath(adapters)) / "poet"
    assert "taken" in refusal(load(server, "poet"), 400)["message"]
    assert unload(server, "poet").status_code == 200
    refusal(server.post(CHAT, json=GOOD | {"model": "poet"}), 404)
    refusal(unload(server, "poet"), 404)


def test_nothing_outside_the_folder_is_reached_and_wrong_names_and_folders_are_refused(start, adapters):
    server = start(adapters_from=adapters)
    paths = ["..", ".", "/", "../private", "poet/../../private", "../adapters-too", "outside", "loop", "missing"]
    paths += ["poet/adapter_config.json", "poet\x00", "poet\n", "~", "file:///etc", "/proc/self", "a" * 1024]
    for path in paths:
        assert str(adapters.parent) not in refusal(load(server, "a", path), 404)["message"]
    for name in ("", "a/b", "../a", ".a", "a b", "ä", "a" * 129, "base", 'a"} 1\n', 5, None):
        refusal(load(server, name), 400)
    error = refusal(load(server, "a", "empty"), 400)
    assert "no adapter" in error["message"] and str(adapters) not in error["message"]
    refusal(server.post("/v1/load_lora_adapter", json={"lora_name": "a"}), 400)
    refusal(load(server, "a", base_model_name="x"), 400)
    assert server.engine.names == []


def test_adapters_have_a_most(start, adapters):
    server = start("fixed", adapters_from=adapters, max_adapters=2)
    assert load(server, "a").status_code == 200
    assert "2 adapters are loaded, and 2 may be" in refusal(load(server, "b"), 400)["message"]
    for answer in (load(server, "a", load_inplace=True), unload(server, "a"), load(server, "b")):
        assert answer.status_code == 200


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    ServerSettings(host="0.0.0.0", keys=(KEY,)).check()
    ServerSettings(host="0.0.0.0").check(without_key=True)
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"):
        ServerSettings(host=host).check()
    wrong = [({"keys": (key,)}, "API key") for key in ("short", "with a space in it", "schlüssel-lang")]
    wrong += [({"host": "0.0.0.0"}, "others reach"), ({"adapters_from": tmp_path / "none"}, "no such folder")]
    for settings, says in (*wrong, ({"certificate": tmp_path}, "TLS")):
        with pytest.raises(UserError, match=says):
            ServerSettings(**settings).check()
