"""The document of the live page: one file without a build step, put together from those beside this one."""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = "page.css"
SCRIPTS = ("elements.js", "events.js", "charts.js", "now.js", "requests.js", "callers.js", "try.js", "page.js")
"""In their order: each may use what stands in those before it."""


class Document:
    """The document, read once.

    Attributes:
        body: UTF-8.
        policy: its Content-Security-Policy: nothing runs or is loaded but what it holds itself, nobody is asked but
            the gateway, and no text becomes HTML (`trusted-types`).
    """

    def __init__(self) -> None:
        style = _read(STYLE)
        script = '\n(() => {\n"use strict";\n' + "\n".join(map(_read, SCRIPTS)) + "})();\n"
        page = _read("page.html").replace("<style></style>", f"<style>{style}</style>", 1)
        self.body = page.replace("<script></script>", f"<script>{script}</script>", 1).encode()
        self.policy = "; ".join(
            (
                "default-src 'none'",
                f"script-src {_source(script)}",
                f"style-src {_source(style)}",
                "img-src data:",
                "connect-src 'self'",
                "form-action 'none'",
                "base-uri 'none'",
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            )
        )


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """Return what names an inline text in a policy (CSP 3, 2.3.1)."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
