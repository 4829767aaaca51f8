"""gpt-oss' channels: a completion is several messages, each with a header that says where it goes.

`<|channel|>analysis<|message|>...<|end|>` is reasoning, the channel `final` is content, and a
header with `to=functions.NAME` is a call whose arguments are JSON. OpenAI calls this form harmony.

>>> text = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
>>> parser = HarmonyParser(tools={"add": {}})
>>> [delta.call.name for delta in parser.feed(text)]
['add']
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gspo.serve.call_formats import Call, Format, Tools, json_values
from gspo.serve.tool_calls import Delta, Parser, marks, may_begin

_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_MESSAGE = "<|message|>"
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
_CHANNEL = re.compile(r"<\|channel\|>(\w+)")
HARMONY = Format("harmony", "<|channel|>", "<|call|>", lambda text, tools: [])


class HarmonyParser(Parser):
    """Reads a text piece by piece, as `CallParser` does. Without tools, all calls stay text."""

    def __init__(self, tools: Tools, key: str = "", special: Iterable[str] = ()):
        super().__init__(HARMONY, tools, key)
        self._dropped = marks(frozenset(special) | {*_ENDS, "<|start|>"})[0]
        self._header: str | None = None

    def _step(self, last: bool) -> bool:
        """Read a header, or what can be passed on of a body. Return whether there is more."""
        if self._header is None:
            found = self._text.find(_MESSAGE, self._at)
            if found < 0:
                if last:  # no message: what is left is text
                    self._content(self._text[self._at :])
                    self._at = len(self._text)
                return False
            self._header, self._at = self._text[self._at : found], found + len(_MESSAGE)
            return True
        pattern, beginnings = marks(frozenset(_ENDS))
        found = pattern.search(self._text, self._at)
        end = found.start() if found else len(self._text)
        if not found and not last:
            end -= may_begin(self._text[self._at :], beginnings)
        body = self._text[self._at : end]
        if recipient := _RECIPIENT.search(self._header):
            if not found and not last:
                return False  # a call comes whole
            after = found.end() if found else end
            self._call(recipient[1], body, self._text[:after])
        elif (channel := _CHANNEL.search(self._header)) and channel[1] == "analysis":
            self._out += [Delta(reasoning=body)] if body else []
        else:
            self._content(body)
        self._at = found.end() if found else end
        if found:
            self._header = None
        return bool(found)

    def _call(self, name: str, body: str, text: str) -> None:
        values = json_values(body)
        if name in self.tools and len(values) == 1 and isinstance(values[0], dict):
            self._called([Call(name, values[0])], text)
        else:
            self._content(body)

    def _content(self, text: str) -> None:
        if text := self._dropped.sub("", text):
            self._out.append(Delta(content=text))
