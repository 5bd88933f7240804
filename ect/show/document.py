"""A page of headings, sentences, tables and pictures, written as Markdown and as one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ect.show.table import Table

MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd; }
p { margin: .5rem 0; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #eee; }
th { font-weight: 600; border-bottom-color: #bbb; }
.left { text-align: left; }
pre { background: #f6f6f6; padding: .6rem .8rem; border-radius: 4px; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: .6rem 0; flex: 1 1 300px; }
img { max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #555; }
"""  # noqa: E501


@dataclass(frozen=True)
class Heading:
    """The title of the page (level 1) or of a part of it (2)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Code:
    """Text as it is typed."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG or SVG file beside the page."""

    path: Path
    caption: str


Block = str | Heading | Code | Table | Sequence[Picture]
"""A string is a paragraph. Pictures of one block stand side by side."""


def markdown(blocks: Sequence[Block]) -> str:
    """Return the page in Markdown; its pictures are files beside it."""
    return "\n".join(_markdown(block).rstrip("\n") + "\n" for block in blocks)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Code(text):
            return f"```\n{text}\n```"
        case Table():
            return block.markdown()
        case str():
            return block
        case _:
            return "\n\n".join(f"![{picture.caption}]({picture.path.name})" for picture in block)


def html(title: str, blocks: Sequence[Block]) -> str:
    """Return the page as HTML with its pictures inside: no script, no other file, no network."""
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>'
    )
    body = "\n".join(map(_html, blocks))
    begin = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<style>{STYLE}</style>\n</head>'
    return f"{begin}\n<body>\n{body}\n</body>\n</html>\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Table():
            return block.html()
        case str():
            return f"<p>{escape(block)}</p>"
        case _:
            return f'<div class="pictures">{"".join(map(_figure, block))}</div>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    source = f"data:{MEDIA[picture.path.suffix]};base64,{data}"
    caption = escape(picture.caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
