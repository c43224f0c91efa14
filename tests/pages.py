"""Reads a page as a browser would, and fails on what a self-contained page may not have."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"img", "meta"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "nav", "section", "h1", "h2", "h3"),
    *("p", "a", "div", "span", "b", "ul", "li", "code", "table", "thead", "tbody", "tr", "th"),
    *("td", "dl", "dt", "dd", "figure", "figcaption", "img", "details", "summary"),
}


class Page(HTMLParser):
    """A page's sections (title and text), its text, and its images."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.sections = []
        self.ids = []
        self.links = []
        self.images = 0
        self.sizes = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        assert tag in ALLOWED, tag
        names = dict(attrs)
        assert not [name for name in names if name.startswith("on") or name == "srcset"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(("", ""))
        if "id" in names:
            self.ids.append(names["id"])
        if "href" in names:
            assert names["href"].startswith("#")
            self.links.append(names["href"][1:])
        if tag == "img":
            self._decode(names)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += f" {data}"
        if "section" in self.open:
            title, text = self.sections[-1]
            is_title = self.open[-1] == "h2"
            self.sections[-1] = (title + data, text) if is_title else (title, f"{text} {data}")

    def _decode(self, names):
        head, _, content = names["src"].partition(";base64,")
        assert head in ("data:image/png", "data:image/jpeg")
        assert names["alt"]
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        image.load()
        self.sizes.add(image.size)
        self.images += 1


def read_page(text):
    """Parse a whole page, and check that it is one."""
    assert len(text.encode()) < 2_000_000
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.links == page.ids
    assert all(title and content.strip() for title, content in page.sections)
    page.text = " ".join(page.text.split())
    return page
