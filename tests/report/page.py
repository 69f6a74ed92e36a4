"""Read a page as a browser would, and check that it is self-contained."""

import re
from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collect attributes and the text of each section, blanks joined; check that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.raw: dict[str, str] = {}
        self.feed(text)
        self.close()
        self.sections = {name: " ".join(words.split()) for name, words in self.raw.items()}
        self.text = text

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.handle_startendtag(tag, attrs)
        if tag == "section":
            self.current = dict(attrs)["id"]
            self.raw[self.current] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.counts[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"
        self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if "section" in self.open:
            self.raw[self.current] += data


def check_nothing_is_fetched_or_run(page: Page) -> None:
    """Assert that the page has no address but its own, follows both themes, and is all in HTML.

    A script may stand inline at its end, which adds to what is there: no event in attributes.
    """
    script = re.search(r"<script>(.*)</script>\s*</body>\s*</html>\s*$", page.text, re.DOTALL)
    assert page.counts["script"] == (script is not None)
    assert not script or not re.search(r"fetch|import|eval|src|http|innerHTML", script[1])
    for tag, key, value in page.attributes:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert not key.startswith("on"), key
        if key in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, key, value[:60])
    assert "@import" not in page.text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.text))
    # Only the names of XML namespaces look like addresses; nothing reads them.
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page.text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    pictures = [key for tag, key, _ in page.attributes if tag == "img"]
    assert pictures.count("alt") == page.counts["img"]
    # A colour that stays as it is would vanish on one of the two backgrounds.
    assert not re.findall(r"(?:fill|stroke): #(?:0{6}|f{6})", page.text)
