"""The route of the chat page; an application includes the router. Knows nothing of engines."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from deltaw.serving.http.page.document import chat_page


def page_router() -> APIRouter:
    """``GET /``: the page. It needs no API key: it asks for one where the server wants it."""
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    def page(request: Request) -> Response:
        document = chat_page()
        headers = {
            "Content-Security-Policy": document.policy,
            "Cache-Control": "no-cache",
            "ETag": document.tag,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Opener-Policy": "same-origin",
        }
        if request.headers.get("if-none-match") == document.tag:
            return Response(status_code=304, headers=headers)
        return Response(document.content, media_type="text/html; charset=utf-8", headers=headers)

    return router
