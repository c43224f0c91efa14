"""Pages of HTML that need nothing but themselves: no network, no script and no other file."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaimplicit.training.files import write_atomically

STYLE = Path(__file__).with_name("page.css")
WITHOUT_CONTENT = ("img", "meta")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is loaded or run
CHART_DPI = 144
LARGEST_PICTURE = 64  # pixels a side
LONGEST_LINE = 40  # characters in a cell of a table


class Html(str):
    """Text that is HTML already. All other text is escaped when it becomes part of an element."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """An element. What is None is left out, and an underscore ends names such as `class_`.

    Every page is made of these. So it is well nested, and text in it cannot become markup.

    Example:
        >>> print(element("p", "1 < 2, ", element("b", "so")), element("i", class_="soft"))
        <p>1 &lt; 2, <b>so</b></p> <i class="soft"></i>
    """
    given = "".join(
        f' {name.rstrip("_")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in WITHOUT_CONTENT:
        return Html(f"<{tag}{given}>")
    content = "".join(
        child if isinstance(child, Html) else html.escape(str(child))
        for child in children
        if child is not None
    )
    return Html(f"<{tag}{given}>{content}</{tag}>")


def number(value: float) -> str:
    """A number to four digits.

    Example:
        >>> number(12345.6), number(0.00001234), number(3)
        ('1.235e+04', '1.234e-05', '3')
    """
    return f"{value:.4g}"


def plain(value: object) -> str:
    """A value of JSON in plain words.

    Example:
        >>> plain(True), plain(None), plain(0.30000001), plain([40, 40]), plain({"rank": 5})
        ('yes', '–', '0.3', '40, 40', 'rank 5')
        >>> plain({"mean": 0.98, "interval_95": 0.003})
        '0.98 ± 0.003'
    """
    if value is None or value in ("", [], {}, ()):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        if value.keys() == {"mean", "interval_95"}:
            return f"{plain(value['mean'])} ± {plain(value['interval_95'])}"
        return ", ".join(f"{name} {plain(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return str(value)


def join(parts: Iterable[Html]) -> Html:
    """Elements one after another.

    Example:
        >>> join([element("p", 1), element("p", 2)])
        '<p>1</p><p>2</p>'
    """
    return Html("".join(parts))


def note(text: str) -> Html:
    """A paragraph in a softer colour, for what explains.

    Example:
        >>> note("n > 1")
        '<p class="soft">n &gt; 1</p>'
    """
    return element("p", text, class_="soft")


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table, which scrolls sideways on a narrow screen.

    Example:
        >>> "<td>0.5</td>" in table(["loss"], [[0.5]])
        True
    """
    titles = element("tr", *(element("th", title) for title in head))
    lines = (element("tr", *map(_cell, row)) for row in rows)
    content = element("table", element("thead", titles), element("tbody", *lines))
    return element("div", content, class_="scroll")


def definitions(values: Mapping[str, object]) -> Html:
    """Names and values, in as many columns as fit.

    Example:
        >>> definitions({"seed": 0})
        '<dl><div><dt>seed</dt><dd>0</dd></div></dl>'
    """
    pairs = (
        element("div", element("dt", name), element("dd", value)) for name, value in values.items()
    )
    return element("dl", *pairs)


def tiles(values: Mapping[str, object]) -> Html:
    """The few numbers that a reader looks for first, by what they are.

    Example:
        >>> tiles({"steps": 100})
        '<div class="tiles"><div><b>100</b><span>steps</span></div></div>'
    """
    pairs = (
        element("div", element("b", value), element("span", name)) for name, value in values.items()
    )
    return element("div", *pairs, class_="tiles")


def folded(title: str, *children: object) -> Html:
    """Content that a reader unfolds by a click on its title.

    Example:
        >>> folded("options", note("none"))
        '<details><summary>options</summary><p class="soft">none</p></details>'
    """
    return element("details", element("summary", title), *children)


def chart(figure: Any, caption: str, *, is_wide: bool = False) -> Html:
    """A matplotlib figure with a caption. Its background is left out, so that it suits any page.

    Args:
        figure: The figure.
        caption: What it shows, which a screen reader reads as well.
        is_wide: Whether it is too wide for a narrow screen, where it scrolls then.

    Example:
        >>> from matplotlib.figure import Figure
        >>> chart(Figure(figsize=(1, 1)), "nothing")[:39]
        '<figure class="chart"><img src="data:im'
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=CHART_DPI, transparent=True)
    image = element("img", src=_data_uri("png", file.getvalue()), alt=caption)
    if is_wide:
        image = element("div", image, class_="scroll")
    kind = "chart wide" if is_wide else "chart"
    return element("figure", image, element("figcaption", caption), class_=kind)


def charts(drawn: Iterable[Html]) -> Html:
    """Charts side by side, or one below another on a narrow screen.

    Example:
        >>> charts([])
        '<div class="charts"></div>'
    """
    return element("div", *drawn, class_="charts")


def picture(image: Tensor, alt: str) -> Html:
    """An image of a data set, at most 64 pixels a side.

    Args:
        image: `[1 or 3, height, width]`. Values outside [0, 1] are scaled into it.
        alt: What it shows, in words.

    Example:
        >>> picture(torch.zeros(1, 8, 8), "a black square")[:32]
        '<img src="data:image/png;base64,'
    """
    from PIL import Image

    pixels = image.detach().cpu().float().nan_to_num()
    low = min(float(pixels.min()), 0.0)
    high = max(float(pixels.max()), 1.0)
    levels = ((pixels - low) / (high - low) * 255).round().to(torch.uint8)
    array = levels.squeeze(0) if len(levels) == 1 else levels.permute(1, 2, 0)
    drawn = Image.fromarray(array.numpy())
    is_small = max(drawn.size) <= LARGEST_PICTURE // 2
    drawn.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    kind = "png" if drawn.mode == "L" else "jpeg"  # which is smaller for photographs
    file = io.BytesIO()
    drawn.save(file, format=kind, quality=90)
    pixelated = "pixels" if is_small else None
    return element(
        "img",
        src=_data_uri(kind, file.getvalue()),
        alt=alt,
        class_=pixelated,
    )


def make_page(title: str, lead: Html, sections: Mapping[str, Html]) -> Html:
    """A whole page: a title, what comes first, links to the sections, and the sections by title.

    Example:
        >>> text = make_page("run", note("no results"), {"Options": note("none")})
        >>> '<section id="options"><h2>Options</h2>' in text
        True
    """
    ids = {name: re.sub(r"\W+", "-", name.lower()) for name in sections}
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        element("title", title),
        element("style", Html(STYLE.read_text())),
    )
    links = element("nav", *(element("a", n, href=f"#{ids[n]}") for n in sections))
    content = (
        element("section", element("h2", name), section, id=ids[name])
        for name, section in sections.items()
    )
    main = element("main", element("h1", title), lead, links, *content)
    document = element("html", head, element("body", main), lang="en")
    # A file's name may hold bytes that are not UTF-8, which Python writes as surrogates.
    return Html(f"<!doctype html>\n{document}\n".encode(errors="backslashreplace").decode())


def leave_page(path: str | Path, make: Callable[[], str]) -> None:
    """Make a page and write it atomically. If that fails, warn: a page costs no run its results.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "report.html")
        ...     leave_page(path, lambda: make_page("run", note("no results"), {}))
        ...     path.read_text()[:15]
        '<!doctype html>'
    """
    try:
        text = make().encode()
        write_atomically(Path(path), lambda file: file.write(text))
    except Exception as error:
        warnings.warn(
            f"{path} could not be written ({type(error).__name__}: {error}); "
            "all other results are there",
            stacklevel=2,
        )


def _cell(content: object) -> Html:
    """A cell of a table. Only long text is broken into lines."""
    is_long = not isinstance(content, Html) and len(str(content)) > LONGEST_LINE
    return element("td", content, class_="words" if is_long else None)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
