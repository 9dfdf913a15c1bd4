"""Who may ask: keys, host names, other origins, and the folder that adapters come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deltaw.errors import UserError
from deltaw.serving.http.settings import ServerSettings
from tests.serving.http.test_hostile_requests import CHAT, GOOD, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.serving.http.running import Running

KEY, OTHER = "correct-horse-1", "correct-horse-2"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_asked_for_everywhere_but_at_the_probes(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, keys=(KEY, OTHER)))
    with server.client() as client:
        for path in ("/health", "/ready"):
            assert client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/models/base", "/nothing", "//health"):
            response = client.get(path)
            assert refusal(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for wrong in (KEY[:-1], KEY + "1", KEY.upper(), f"{KEY} {OTHER}", "ü" * 12):
            headers = [(b"Authorization", f"Bearer {wrong}".encode())]
            refusal(client.post(CHAT, json=GOOD, headers=headers), 401)
        refusal(client.post(CHAT, json=GOOD, headers={"Authorization": KEY}), 401)
        for right in (KEY, OTHER):
            assert client.post(CHAT, json=GOOD, headers=bearer(right)).status_code == 200
    assert len(server.engine.submitted) == 2


def test_each_key_has_computed_prompts_of_its_own(start: Callable[..., Running]) -> None:
    def owners(**settings: Any) -> list[int]:
        server = start(ServerSettings(port=0, **settings))
        with server.client() as client:
            for key in (KEY, settings["keys"][-1], KEY):
                headers = bearer(key)
                assert client.post(CHAT, json=GOOD, headers=headers).status_code == 200
                asked = {"model": "base", "prompt": "a"}
                assert client.post("/v1/completions", json=asked, headers=headers).status_code == 200
        return [request.owner for request in server.engine.submitted]

    assert owners(keys=(KEY, OTHER)) == [1, 1, 2, 2, 1, 1]
    assert owners(keys=(KEY, OTHER), share_cache=True) == [0] * 6
    assert owners(keys=(KEY,)) == [0] * 6


def test_names_that_others_made_point_here_are_refused(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, hosts=("models.example",)))
    with server.client() as client:
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            assert refusal(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
        for host in ("localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000", "models.example:8000"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_other_origins_are_off_unless_named(start: Callable[..., Running]) -> None:
    preflight = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    closed = start(ServerSettings(port=0))
    opened = start(ServerSettings(port=0, origins=("https://page.example",), keys=(KEY,)))
    with closed.client() as client:
        assert client.options(CHAT, headers=preflight).status_code == 405
        headers = client.get("/v1/models", headers={"Origin": "https://page.example"}).headers
        assert "access-control-allow-origin" not in headers
    with opened.client() as client:
        allowed = client.options(CHAT, headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = client.options(CHAT, headers=preflight | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        refusal(client.post(CHAT, json=GOOD, headers={"Origin": "https://page.example"}), 401)


def test_answers_carry_the_headers_that_browsers_heed(shared: Running) -> None:
    with shared.client() as client:
        for response in (client.get("/v1/models"), client.get("/nothing"), client.post(CHAT, json=GOOD)):
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
    (root / "inside").symlink_to(root / "poet")
    (root / "outside").symlink_to(tmp_path / "private")
    (root / "loop").symlink_to(root / "loop")
    return root


def load(client: Any, name: object, path: object) -> Any:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def test_adapters_are_loaded_and_unloaded(start: Callable[..., Running], adapters: Path) -> None:
    server = start(ServerSettings(port=0, adapters_from=adapters), "fixed")
    with server.client() as client:
        refusal(client.post(CHAT, json=GOOD | {"model": "poet"}), 404)
        for name, path in (
            ("poet", "poet"),
            ("other", str(adapters / "poet")),
            ("clerk.v2", "deep/clerk"),
            ("link", "inside"),
            ("dots", "deep/../poet"),
        ):
            response = load(client, name, path)
            assert response.status_code == 200 and name in response.text
        assert client.post(CHAT, json=GOOD | {"model": "clerk.v2"}).status_code == 200
        shelf: Any = server.served.shelf
        assert shelf.folders["link"] == shelf.folders["poet"] == Path(os.path.realpath(adapters)) / "poet"
        assert "taken" in refusal(load(client, "poet", "poet"), 400)["message"]
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
        assert gone.status_code == 200
        refusal(client.post(CHAT, json=GOOD | {"model": "poet"}), 404)
        refusal(client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}), 404)


def test_nothing_outside_the_folder_is_reached(start: Callable[..., Running], adapters: Path) -> None:
    server = start(ServerSettings(port=0, adapters_from=adapters))
    paths = ["..", ".", "/", "../private", "poet/../../private", "../adapters-too", "outside", "loop", "missing"]
    paths += ["poet/adapter_config.json", "poet\x00", "poet\n", "~", "file:///etc", "/proc/self", "a" * 1024]
    with server.client() as client:
        for path in paths:
            error = refusal(load(client, "a", path), 404)
            assert str(adapters.parent) not in error["message"]
    assert server.engine.names == []


def test_wrong_names_and_folders_are_refused(start: Callable[..., Running], adapters: Path) -> None:
    server = start(ServerSettings(port=0, adapters_from=adapters))
    with server.client() as client:
        for name in ("", "a/b", "../a", ".a", "a b", "ä", "a" * 129, "base", 'a"} 1\n', 5, None):
            refusal(load(client, name, "poet"), 400)
        error = refusal(load(client, "a", "empty"), 400)
        assert "no adapter" in error["message"] and str(adapters) not in error["message"]
        refusal(client.post("/v1/load_lora_adapter", json={"lora_name": "a"}), 400)
        more = {"lora_name": "a", "lora_path": "poet", "base_model_name": "x"}
        refusal(client.post("/v1/load_lora_adapter", json=more), 400)
    assert server.engine.names == []


def test_adapters_have_a_most(start: Callable[..., Running], adapters: Path) -> None:
    server = start(ServerSettings(port=0, adapters_from=adapters, max_adapters=2), "fixed")
    with server.client() as client:
        assert load(client, "a", "poet").status_code == 200
        error = refusal(load(client, "b", "poet"), 400)
        assert "2 adapters are loaded, and 2 may be" in error["message"]
        in_place = {"lora_name": "a", "lora_path": "poet", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=in_place).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 200
        assert load(client, "b", "poet").status_code == 200


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="others reach"):
        ServerSettings(host="0.0.0.0").check()
    ServerSettings(host="0.0.0.0", keys=(KEY,)).check()
    ServerSettings(host="0.0.0.0").check(without_key=True)
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"):
        ServerSettings(host=host).check()
    for key in ("short", "with a space in it", "schlüssel-lang"):
        with pytest.raises(UserError, match="API key"):
            ServerSettings(keys=(key,)).check()
    with pytest.raises(UserError, match="no such folder"):
        ServerSettings(adapters_from=tmp_path / "none").check()
    with pytest.raises(UserError, match="TLS"):
        ServerSettings(certificate=tmp_path).check()
