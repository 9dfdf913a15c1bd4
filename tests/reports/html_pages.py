"""Checks of HTML pages: well formed, self-contained, accessible, and without scripts other than the page's own, which
the content security policy allows by digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from deltaw.reports.svg import templates

OWN_SCRIPT = templates()[0].globals["script"]
VOID = {"meta", "br", "hr", "img", "input", "link", "line", "rect", "path"}


class Page(HTMLParser):
    """Parsed elements of a page. ``faults`` lists its problems."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        lists: tuple[list, ...] = tuple([] for _ in range(8))
        self.faults, self.open, self.ids, self.references, self.headings, self.words, self.marked, self.drawings = lists
        self.tags: dict[str, int] = {}
        self.policy = ""
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]
        self.faults += [f"id '{i}' is not unique" for i in {i for i in self.ids if self.ids.count(i) > 1}]
        self.faults += [f"reference to missing id '{name}'" for name in self.references if name not in self.ids]
        for level, next_level in zip([0, *self.headings], self.headings, strict=False):
            if next_level > level + 1:
                self.faults.append(f"heading level {next_level} follows level {level}")
        if re.search(r"""(?:href|src|url\()\s*=?\s*["']?(?:https?:)?//""", text):
            self.faults.append("external reference")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += attributes.get(name, "").split()
        if attributes.get("href", "").startswith("#"):
            self.references.append(attributes["href"][1:])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if (tag == "script" and attributes) or any(name.startswith("on") for name in attributes):
            self.faults.append(f"a script: <{tag}>")
        if tag == "th" and attributes.get("scope") not in ("col", "row"):
            self.faults.append("a <th> without scope")
        if attributes.get("role") == "img":
            self.drawings.append({"title": False, "desc": False})
        if tag in ("title", "desc") and self.drawings and "svg" in self.open:
            self.drawings[-1][tag] = True
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:] or 'no element'}, at {self.getpos()}")
        if tag in self.open:
            while self.open and self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if "script" in self.open:
            digest = base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
            if data != OWN_SCRIPT or f"script-src 'sha256-{digest}'" not in self.policy:
                self.faults.append(f"a script: {data}")
            return
        self.words.append(data)
        if "mark" in self.open:
            self.marked.append(data)

    @property
    def text(self) -> str:
        """Return all text with single spaces."""
        return " ".join(" ".join(self.words).split())
