"""Markdown to HTML: what is kept, and what never comes through."""

import re
from html import unescape

import pytest

from service.markdown import render
from tests.browser.hostile import hostile_texts

LINK = ' target="_blank" rel="noopener noreferrer nofollow"'


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b** *c* `d` ~~e~~", "<p>a <strong>b</strong> <em>c</em> <code>d</code> <s>e</s></p>"),
        ("one\ntwo", "<p>one<br>\ntwo</p>"),
        ("```py\nx < 1\n```", "<pre><code>x &lt; 1\n</code></pre>"),
        ("3. a\n4. b", '<ol start="3">\n<li>a</li>\n<li>b</li>\n</ol>'),
        ("[a](https://b.c)", f'<p><a href="https://b.c"{LINK}>a</a></p>'),
        ("![a](https://b.c/d.png)", f'<p><a href="https://b.c/d.png"{LINK}>a</a></p>'),
        ("![](https://b.c/d.png)", f'<p><a href="https://b.c/d.png"{LINK}>https://b.c/d.png</a></p>'),
        ("[a](/v1/keys) [b](//c.d)", f"<p><a{LINK}>a</a> <a{LINK}>b</a></p>"),
        ("<b>x</b>", "<p>&lt;b&gt;x&lt;/b&gt;</p>"),
        ("a\u202eb\u2067c", "<p>ab\u2067c</p>"),
        ("", ""),
    ],
)
def test_what_is_kept(text: str, html: str) -> None:
    assert render(text).strip() == html


def test_a_row_that_leaves_its_cells_out_asks_for_no_megabyte() -> None:
    assert render("|a|b|\n|-|-|\n|1|").count("<td>") == 2
    text = "|a" * 256 + "\n" + "|-" * 256 + "\n" + "|\n" * 250
    assert len(render(text)) < 20 * len(text)


def test_an_address_is_not_written_out_again_and_again() -> None:
    text = f"[a]: http://x/{'y' * 5000}\n\n" + "[a]" * 1500
    assert len(render(text)) < 20 * len(text)


def test_tables_are_kept_without_their_styles() -> None:
    html = render("|a|b|\n|:-|-:|\n|1|2|")
    assert re.sub(r"\s", "", html) == (
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"
    )


TAG = re.compile(r"<(/?)([a-z0-9]+)((?: [a-z]+=\"[^\"]*\")*)\s*/?>")
SAFE = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code"),
    *("a", "em", "strong", "s", "table", "thead", "tbody", "tr", "th", "td"),
}


@pytest.mark.parametrize("seed", range(5))
def test_of_hostile_texts_only_harmless_tags_come_through(seed: int) -> None:
    for text in hostile_texts(200, seed=seed):
        html = render(text)
        rest = TAG.sub("", html)
        assert "<" not in rest, text
        for _, tag, attributes in TAG.findall(html):
            assert tag in SAFE, text
            for name, value in re.findall(r' ([a-z]+)="([^"]*)"', attributes):
                assert name in {"href", "title", "rel", "target", "start"}, text
                if name == "href":
                    assert re.match(r"(https?:|mailto:)", unescape(value)), text
