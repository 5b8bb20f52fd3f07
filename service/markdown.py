"""Markdown to HTML that is safe to show, whoever wrote it. Pure.

Raw HTML stays text, images become links (loading one would tell another host who reads), and what markdown-it-py makes
of it passes through nh3's allow-list, so a fault in one of the two is not yet a hole."""

import sys
from collections.abc import Sequence
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

_TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code"),
    *("a", "em", "strong", "s", "table", "thead", "tbody", "tr", "th", "td"),
}
_CLEANER = nh3.Cleaner(
    tags=_TAGS,
    attributes={"a": {"href", "title"}, "ol": {"start"}},
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",  # a model's text has no business with our own addresses
    link_rel="noopener noreferrer nofollow",
    set_tag_attribute_values={"a": {"target": "_blank"}},
)
_OVERRIDES = {ord(mark): None for mark in "\u202a\u202b\u202d\u202e"}
"""Marks that show text in another order than it is in. Their isolating successors end with their line, and may stay."""


def _image_as_link(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    source = str(tokens[index].attrGet("src") or "")
    return f'<a href="{escape(source)}">{escape(tokens[index].content or source)}</a>'


# A row may leave cells out, so that a kilobyte of table could ask for a megabyte of empty ones. The limit is no option
# of markdown-it's, and the package gives its function the module's name.
sys.modules["markdown_it.rules_block.table"].MAX_AUTOCOMPLETED_CELLS = 1_000  # type: ignore[attr-defined]
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_MARKDOWN.disable("reference")  # a long address written once could be asked for in every word
_MARKDOWN.add_render_rule("image", _image_as_link)


def render(text: str) -> str:
    """HTML of paragraphs, lists, code, tables, emphasis and links to http, https and mailto; nothing else."""
    return _CLEANER.clean(_MARKDOWN.render(text.translate(_OVERRIDES)))
