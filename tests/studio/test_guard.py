"""Access to the studio: token, cookie, host, origin and headers."""

from __future__ import annotations

import os
import threading
import time
import webbrowser

import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")
from click.testing import CliRunner
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import URL

from deltaw.cli import group
from deltaw.cli.studio import redirect_page
from deltaw.serving.http import server
from tests.studio.client import StudioClient, connect


def routes(client: StudioClient, methods: set[str]) -> list[APIRoute]:
    found = []
    pending = [client.app.router]
    while pending:
        for route in pending.pop().routes:
            if isinstance(route, APIRoute):
                found += [route] if route.methods & methods else []
            elif (included := getattr(route, "original_router", None)) is not None:
                pending.append(included)
    return found


def test_pages_need_the_cookie(tmp_path) -> None:
    client = connect(tmp_path, log_in=False)
    response = client.get("/")
    assert response.status_code == 401 and "terminal" in response.text
    assert client.put("/files/a.csv", content=b"a").status_code == 401
    assert client.get("/static/studio.css").status_code == 200


def test_token_sets_the_cookie_once_and_a_second_browser_gets_a_new_token(tmp_path) -> None:
    client = connect(tmp_path)
    assert client.get("/").status_code == 200
    cookie = client.cookies["deltaw-studio-7860"]
    first = client.get("/", params={"token": "wrong"})
    assert first.status_code == 303  # the browser is connected already
    client.cookies.clear()
    assert client.get("/", params={"token": "wrong"}).status_code == 403 and client.announced == []
    other = connect(tmp_path, log_in=False)
    used = other.token.value
    assert other.get("/", params={"token": used}).status_code == 200
    other.cookies.clear()
    for _ in range(2):
        assert other.get("/", params={"token": used}).status_code == 403
    assert len(other.announced) == 1
    assert other.get("/", params={"token": other.announced[0]}).status_code == 200
    assert other.cookies["deltaw-studio-7860"] == cookie  # of the folder, so open pages survive a restart
    secret = other.studio.workspace.state / "session"
    assert secret.stat().st_mode & 0o77 == 0


def test_damaged_secret_is_replaced(tmp_path) -> None:
    (connect(tmp_path).studio.workspace.state / "session").write_text("")
    client = connect(tmp_path, log_in=False)
    assert client.get("/", headers={"Cookie": "deltaw-studio-7860="}).status_code == 401


def test_cookies_of_other_programs_are_ignored(client) -> None:
    name = "deltaw-studio-7860"
    value = client.cookies["deltaw-studio-7860"]
    client.cookies.clear()
    for cookie, status in ((f'other={{"a": [1]}}; {name}={value}', 200), (f"{name}=é", 401), (f"{name}=", 401)):
        assert client.get("/runs", headers={"Cookie": cookie.encode()}).status_code == status


def test_cookie_is_not_readable_by_scripts_or_other_sites(tmp_path) -> None:
    client = connect(tmp_path, log_in=False)
    token = client.token.value
    cookie = client.get("/", params={"token": token}).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and token not in cookie


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "127.0.0.1:7860/static/?"])
def test_other_hosts_are_rejected(client, host) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 403


def test_path_is_not_read_from_the_host_header(tmp_path, monkeypatch) -> None:
    client = connect(tmp_path, log_in=False)
    monkeypatch.setattr(Request, "url", URL("http://127.0.0.1/static/?/runs"))  # as in Starlette 0.46
    assert client.get("/runs").status_code == 401


def test_head_request_does_not_use_the_token(tmp_path) -> None:
    client = connect(tmp_path, log_in=False)
    address = {"token": client.token.value}
    assert client.head("/", params=address).status_code == 401
    assert client.get("/", params=address).status_code == 200


@pytest.mark.parametrize("site", ["same-site", "cross-site"])
def test_other_pages_may_link_to_pages_but_not_fetch_or_frame_them(client, site) -> None:
    for mode, target, status in (("navigate", "document", 200), ("navigate", "iframe", 403), ("no-cors", "image", 403)):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": target}
        assert client.get("/runs", headers=headers).status_code == status


def test_allowed_host(tmp_path) -> None:
    client = connect(tmp_path, hosts=("studio.lan",))
    assert client.get("/static/studio.css", headers={"Host": "studio.lan:7860"}).status_code == 200


@pytest.mark.parametrize("origin", ["", "null", "http://127.0.0.1:1", "https://127.0.0.1:7860", "cross-site"])
def test_changes_need_the_origin_of_the_studio(client, origin) -> None:
    headers = {"Sec-Fetch-Site": origin} if origin == "cross-site" else {"Origin": origin}
    changing = routes(client, {"POST", "PUT", "DELETE"})
    assert len(changing) >= 5
    for route in changing:
        path = route.path.replace("{path:path}", "x").replace("{rest:path}", "x").replace("{identity}", "0" * 12)
        method = next(iter(route.methods - {"GET", "HEAD"}))
        assert client.request(method, path.replace("{name}", "a.csv"), headers=headers).status_code == 403, path


def test_all_responses_have_security_headers(client) -> None:
    for path in ("/", "/runs", "/nothing", "/static/studio.js", "/drafts/" + "0" * 12 + "/data"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"


def test_templates_contain_no_inline_code(client) -> None:
    from deltaw.studio.rendering import environment

    loader = environment().loader.loaders[0]
    for name in loader.list_templates():
        text = loader.get_source(environment(), name)[0]
        assert " style=" not in text and "<style" not in text and " on" + "click" not in text, name
        assert "<script>" not in text, name


def test_errors_are_pages_without_details(client, monkeypatch, capsys) -> None:
    monkeypatch.setattr(type(client.studio.workspace), "drafts", lambda self: 1 / 0)
    response = client.get("/")
    assert response.status_code == 500 and "ZeroDivisionError" not in response.text
    assert "content-security-policy" in response.headers
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_wrong_method_and_missing_page_are_explained(client) -> None:
    assert "This request is not allowed here" in client.post("/runs").text
    assert "This page does not exist" in client.get("/missing").text


def test_static_files_are_cached_by_their_tag(client) -> None:
    tag = client.get("/static/studio.js").headers["etag"]
    assert client.get("/static/studio.js", headers={"If-None-Match": tag}).status_code == 304
    assert client.get("/static/guard.py").status_code == 404


def test_certificate_needs_its_key(tmp_path) -> None:
    certificate = tmp_path / "certificate.pem"
    certificate.write_text("")
    result = CliRunner().invoke(group, ["studio", str(tmp_path / "s"), "--certificate", str(certificate)])
    assert "TLS needs a certificate and its key" in str(result.exception)


def test_form_from_the_studio_is_accepted(client) -> None:
    client.studio.workspace.folder.joinpath("rows.csv").write_text("a,b\n1,2\n")
    response = client.post("/drafts", data={"file": "rows.csv"}, headers={"Sec-Fetch-Site": "same-origin"})
    assert response.status_code == 303 and client.get(response.headers["location"]).status_code == 200


def test_browser_that_stays_in_the_foreground_does_not_block_the_server(tmp_path, monkeypatch) -> None:
    answered = threading.Event()
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append((answered.wait(5), address)))
    monkeypatch.setattr(server, "run", lambda app, queue, settings, listening, ready: (ready(), answered.set()))
    result = CliRunner().invoke(group, ["studio", str(tmp_path / "s"), "--port", "0"], catch_exceptions=False)
    assert result.exit_code == 0 and "?token=" in result.output
    while not opened:
        time.sleep(0.01)
    (is_answered, address) = opened[0]
    assert is_answered
    if os.name == "posix":  # other users see the command line of the browser
        assert "token" not in address and address.startswith((tmp_path / "s").as_uri())
        assert not list((tmp_path / "s").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions of files")
def test_page_that_opens_the_browser_is_readable_only_by_the_user(tmp_path) -> None:
    file = tmp_path / "open.html"
    assert redirect_page(file, "http://127.0.0.1:1/?token=x") == file.as_uri()
    assert "url=http://127.0.0.1:1/?token=x" in file.read_text() and file.stat().st_mode & 0o77 == 0
    with pytest.raises(FileExistsError):  # links are not followed
        redirect_page(file, "x")
