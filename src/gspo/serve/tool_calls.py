"""Tool calls in the text that a model writes, read whole or piece by piece.

A malformed call, or one of a tool that was not offered, stays text.

>>> from gspo.serve.call_formats import FORMATS
>>> parser = CallParser(FORMATS["hermes"], tools={"add": {}})
>>> text = 'Yes.\\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
>>> [delta.content or delta.call.arguments for delta in parser.feed(text)]
['Yes.', '{"a": 1}']
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gspo.serve.call_formats import Call, Format, Tools


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: `arguments` is the text of a JSON object, as in OpenAI's API."""

    id: str
    name: str
    arguments: str

    def wire(self) -> dict[str, Any]:
        """The call as a message of OpenAI's API has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Delta:
    """What new text adds to a message: content, reasoning, or a whole call."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True)
class Parsed:
    """The message that a text is. `content` is None if there are calls and nothing else."""

    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None

    def wire(self) -> dict[str, Any]:
        """The message in the form of OpenAI's API."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.wire() for call in self.tool_calls]
        return message


@lru_cache(maxsize=64)
def marks(texts: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str]]:
    """What finds one of these texts, and what a text that may become one of them ends with."""
    texts -= {""}
    ordered = sorted(texts, key=len, reverse=True)
    beginnings = frozenset(text[:size] for text in texts for size in range(1, len(text)))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)"), beginnings


def may_begin(text: str, beginnings: frozenset[str]) -> int:
    """How many of the last characters may be the beginning of a mark.

    >>> may_begin("so <tool", marks(frozenset({"<tool_call>"}))[1])
    5
    """
    longest = min(len(text), max(map(len, beginnings), default=0))
    return next((n for n in range(longest, 0, -1) if text[-n:] in beginnings), 0)


class Parser:
    """Reads an answer piece by piece.

    Args:
        form: how calls are written.
        tools: those that may be called.
        key: what the text is an answer to; ids are made of it and of the text up to the call's end.
    """

    def __init__(self, form: Format, tools: Tools, key: str):
        self.form, self.tools, self.key = form, tools, key
        self._text, self._at = "", 0
        self._out: list[Delta] = []

    def feed(self, text: str, last: bool = False) -> list[Delta]:
        """What `text`, which follows what was fed before, adds to the message; with the last one,
        all that it still lacks."""
        self._text += text
        while self._step(last):
            pass
        out, self._out = self._out, []
        return out

    def _step(self, last: bool) -> bool:
        """Read on. Return whether there is more to read."""
        raise NotImplementedError

    def _called(self, calls: list[Call], text: str) -> None:
        """Add the calls that `text` ends with."""
        for number, call in enumerate(calls):
            name = self.form.call_id(f"{self.key}\0{number}\0{text}")
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            self._out.append(Delta(call=ToolCall(name, call.name, arguments)))


class CallParser(Parser):
    """Reads a text piece by piece; the message doesn't depend on where the pieces end.

    Content is passed on at once, unless it may be the beginning of a call or the white space before
    one. A call comes whole, at its end.

    Args:
        form, tools, key: see `Parser`.
        special: special tokens, which are no part of the message.
    """

    def __init__(self, form: Format, tools: Tools, key: str = "", special: Iterable[str] = ()):
        super().__init__(form, tools, key)
        ends = frozenset(special)
        self._plain = marks(ends | {form.opening, "<think>"})
        self._thinking = marks(ends | {"</think>"})
        self._dropped = marks(ends - {form.opening, form.closing, *form.inside})[0]
        self._mode = "start" if form.bare else "plain"
        self._space, self._any = "", False
        self._looked = 0  # up to here there is no end of the call that would be new

    def _step(self, last: bool) -> bool:
        return {"start": self._start, "call": self._inside}.get(self._mode, self._words)(last)

    def _start(self, last: bool) -> bool:
        """At the beginning of a text that may be a call without a mark before it."""
        begun = self._text.lstrip()
        if begun or last:
            self._mode = "call" if begun.startswith("{") else "plain"
        return bool(begun or last)

    def _words(self, last: bool) -> bool:
        """Pass on text up to the next mark. Return whether there is more to read."""
        pattern, beginnings = self._plain if self._mode == "plain" else self._thinking
        found = pattern.search(self._text, self._at)
        if found is None:
            end = len(self._text)
            if not last:
                end -= may_begin(self._text[self._at :], beginnings)
            # A message without calls is what was written, to its end.
            self._content(self._text[self._at : end], last and not self._any)
            self._at = end
            return False
        self._content(self._text[self._at : found.start()])
        self._at = found.end()
        if self._mode == "plain" and found[0] == self.form.opening:
            self._at, self._mode = found.start(), "call"
        elif found[0] in ("<think>", "</think>"):
            self._content(found[0])
            self._mode = "think" if found[0] == "<think>" else "plain"
        return True

    def _inside(self, last: bool) -> bool:
        """Read the call that begins here, if it is whole. Return whether there is more to read."""
        form, text = self.form, self._text
        begin = self._at
        if text.startswith(form.opening, begin):
            begin += len(form.opening)
        mark = form.closing or form.opening
        looked, self._looked = max(begin, self._looked), len(text) - len(mark) + 1
        if not last and text.find(mark, looked) < 0:
            return False
        ends = self._ends(begin, last)
        for end, after in ends:
            body = self._dropped.sub("", text[begin:end])
            calls = form.read(body, self.tools)
            if calls and all(call.name in self.tools for call in calls):
                self._space, self._any = "", True
                self._called(calls, text[:after])
                self._at, self._mode = after, "plain"
                return True
            if not _string_open(body):
                break
        else:
            if not last:
                return False  # the mark that was found stands in a string of the call
        # Malformed: it is text up to where the call seemed to end.
        after = ends[0][1] if ends else len(text)
        self._content(self._dropped.sub("", text[self._at : after]))
        self._at, self._mode = after, "plain"
        return True

    def _ends(self, begin: int, last: bool) -> list[tuple[int, int]]:
        """Where the call may end, and where the text goes on after each of these places."""
        form, text = self.form, self._text
        mark = form.closing or form.opening
        found = [m.span() for m in re.finditer(re.escape(mark), text[begin:])]
        ends = [(begin + a, begin + (b if form.closing else a)) for a, b in found]
        return [*ends, (len(text), len(text))] if last else ends

    def _content(self, text: str, last: bool = False) -> None:
        """Add content; white space at its end waits, since a call may follow."""
        text = self._space + text
        size = len(text) if last else len(text.rstrip())
        self._space = text[size:]
        if size:
            self._out.append(Delta(content=text[:size]))


def _string_open(text: str) -> bool:
    """Whether a piece of JSON ends inside a string."""
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 1


def completion_key(prompt: Sequence[int], index: int) -> str:
    """The key of a request's completion: ids made of it meet only where prompt and text do."""
    return hashlib.sha256(f"{list(prompt)}/{index}".encode()).hexdigest()


def joined(deltas: Iterable[Delta]) -> Parsed:
    """The message that deltas add up to."""
    deltas = list(deltas)
    content = "".join(delta.content for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    calls = tuple(delta.call for delta in deltas if delta.call is not None)
    return Parsed(content or (None if calls else ""), calls, reasoning or None)
