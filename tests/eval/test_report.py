"""The page is one file, with everything in it."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from dq.eval.report import Page


def test_page_embeds_everything_and_escapes_text(tmp_path: Path) -> None:
    page = Page("a <b> title")
    page.text("1 < 2")
    page.heading("numbers & more")
    page.table([{"name": "x<y", "value": 1}, {"name": "z", "value": 2.5}])
    page.image(Image.new("RGB", (3, 2), "red"), 'the "alt"')
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    HTMLParser().feed(text)
    assert "1 &lt; 2" in text
    assert "numbers &amp; more" in text
    assert re.findall("<td>(.*?)</td>", text) == ["x&lt;y", "1", "z", "2.5"]
    assert "http" not in text
    (data,) = re.findall('base64,([^"]+)"', text)
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (3, 2)
    assert picture.getpixel((1, 1)) == (255, 0, 0)


def test_long_tables_can_be_folded(tmp_path: Path) -> None:
    page = Page("x")
    page.table([{"a": 1}], folded="all <images>")
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<details><summary>all &lt;images&gt;</summary><table>" in text
