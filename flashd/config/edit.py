"""Sets keys in the text of a configuration. Every other line stays as its owner wrote it, comments included."""

from __future__ import annotations

import json
import re

PLAIN = re.compile(r"/[\w./-]*|\d+[KMG]")
"""Values that YAML takes for texts without quotes."""

VALUE = r"""[ \t]*(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^'"\s#](?:[^\n#]|(?<=\S)#)*?)?"""


def with_key(text: str, key: str, value: str) -> str:
    """The text with a key of the first level set. A comment behind the old value stays; a new key comes last.

    The caller looks if the result means what it should: a text may be written in ways that this does not know.
    """
    written = f"{key}: {value if PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)}"
    line = re.compile(rf"^{re.escape(key)}[ \t]*:{VALUE}(?P<comment>[ \t]+#[^\n]*)?[ \t]*$", re.MULTILINE)
    changed, found = line.subn(lambda match: written + (match["comment"] or ""), text, count=1)
    if found:
        return changed
    return f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{written}\n"
