"""Chat templates, and label masks that are proven instead of assumed.

A mask is right when every assistant turn (content and end-of-turn token) is trained exactly once and nothing else is.
No template says which of its text is which, so we find out by rendering prefixes of the conversation: the turn of
message i is what `render(messages[:i+1])` adds to `render(messages[:i], add_generation_prompt=True)`. Whatever breaks
that reading (a template that rewrites earlier turns, drops messages, inserts the date, has no end-of-turn token, or a
tokenizer that merges text across the border of a turn) is refused with the span at which it happens.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tulu_hpc.data.records import Message, Tools, message_dicts
from tulu_hpc.data.rows import json_text

# The text is that of Tulu 3 (open-instruct, dataset_transformation.py, key "tulu"): end-of-text closes every assistant
# turn, a line break follows all but the last. Unlike there, an unknown role is an error and not silently left out.
TULU = (
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'user') %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ raise_exception('the Tulu template has no role ' + message['role']) }}"
    "{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    "{% endfor %}"
)


class MaskProofError(ValueError):
    """The label mask of a conversation cannot be proven.

    Attributes:
        span: the text at which the proof fails.
    """

    def __init__(self, reason: str, span: str) -> None:
        shown = span if len(span) <= 120 else span[:80] + " ... " + span[-35:]
        super().__init__(f"{reason}; at {shown!r}")
        self.span = span


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of rendered text: one assistant turn (`message` is its index) or text that is not trained (None)."""

    text: str
    message: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids, which of them are trained, and where the turn of each assistant message begins."""

    token_ids: list[int]
    mask: list[bool]
    turn_starts: dict[int, int]


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` of some templates: only its body counts here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja chat template bound to the special tokens of a tokenizer.

    Args:
        source: Jinja text, with the variables that transformers gives (`messages`, `add_generation_prompt`, special
            tokens by name), but no clock.
        tokenizer: a fast tokenizer of transformers.
        name: shown in errors.

    Raises:
        ValueError: the text is no valid template.
    """

    def __init__(self, source: str, tokenizer: Any, *, name: str = "chat template") -> None:
        # Our own template needs no sandbox, which doubles the time of rendering.
        kind = jinja2.Environment if source == TULU else ImmutableSandboxedEnvironment
        environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name}: line {error.lineno}: {error.message}") from None
        self.source, self.name = source, name
        self._tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        ordered = sorted(special, key=lambda text: (-len(text), text))
        self._special = re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")

    @classmethod
    def load(cls, name: str, tokenizer: Any) -> ChatTemplate:
        """`tulu`, `tokenizer` (the one saved with the tokenizer) or the path of a Jinja file.

        Raises:
            ValueError: there is no such template.
        """
        if name == "tulu":
            if not tokenizer.eos_token:
                raise ValueError("the Tulu template ends turns with the end-of-text token; the tokenizer has none")
            return cls(TULU, tokenizer, name="tulu")
        if name == "tokenizer":
            if not isinstance(tokenizer.chat_template, str):
                raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no (single) chat template")
            return cls(tokenizer.chat_template, tokenizer, name="tokenizer")
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"data.chat_template {name!r}: need `tulu`, `tokenizer` or a Jinja file that exists")
        return cls(path.read_text(encoding="utf-8"), tokenizer, name=name)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = ()) -> str:
        """The text of a conversation, special tokens written out. `tools` are functions that it may call.

        Raises:
            MaskProofError: the template refuses the conversation or asks for something that is not in it.
        """
        try:
            given = {"tools": list(tools)} if tools else {}
            return self._template.render(
                messages=message_dicts(messages), add_generation_prompt=add_generation_prompt, **self._tokens, **given
            )
        except jinja2.UndefinedError as error:
            raise MaskProofError(
                f"{self.name}: {error.message} (text must depend on the conversation alone, not on the clock)",
                messages[-1].content if messages else "",
            ) from None
        except jinja2.TemplateError as error:
            raise MaskProofError(
                f"{self.name}: refused by the template: {error.message}", messages[-1].content if messages else ""
            ) from None

    def refuse_special_tokens(self, messages: Sequence[Message], tools: Tools = ()) -> None:
        """Content must not hold the text of a special token: it would be read as one (and could fake another turn).

        Raises:
            MaskProofError: with the message and the text around it.
        """
        texts = [(f"messages[{i}]", message.content) for i, message in enumerate(messages)]
        texts += [(f"messages[{i}]", json_text(message.extra)) for i, message in enumerate(messages) if message.extra]
        texts += [(f"tools[{i}]", json_text(tool)) for i, tool in enumerate(tools)]
        for where, text in texts:
            if found := self._special.search(text):
                raise MaskProofError(
                    f"{where} contains the text of the special token {found.group()!r}",
                    text[max(0, found.start() - 20) : found.end() + 20],
                )

    def spans(self, messages: Sequence[Message], tools: Tools = ()) -> list[Span]:
        """Cut the rendered conversation into trained and other text; the spans joined are the whole text.

        Raises:
            MaskProofError: with the span at which one of the module's conditions fails.
        """
        self.refuse_special_tokens(messages, tools)
        full = self.render(messages, tools=tools)
        if tools:
            self._expect_tools(full, messages, tools)
        spans: list[Span] = []
        end, done = 0, 0  # characters and messages accounted for
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            begin = self._prefix(full, messages[:index], tools, generate=True)
            last = index + 1 == len(messages)
            until = len(full) if last else self._prefix(full, messages[: index + 1], tools, generate=False)
            if begin < end or until < begin:
                raise MaskProofError(
                    f"{self.name}: the turn of messages[{index}] overlaps the one before", full[min(begin, until) : end]
                )
            self._expect(messages, range(done, index), full[end:begin])
            turn = self._turn(full[begin:until], message, index)
            spans += [Span(full[end:begin]), Span(turn, index)]
            end, done = begin + len(turn), index + 1
        self._expect(messages, range(done, len(messages)), full[end:])
        spans.append(Span(full[end:]))
        return [span for span in spans if span.text]

    def _prefix(self, full: str, messages: Sequence[Message], tools: Tools, *, generate: bool) -> int:
        """Length of the rendered prefix, which the whole conversation must begin with."""
        text = self.render(messages, add_generation_prompt=generate, tools=tools)
        if not full.startswith(text):
            shorter = min(len(text), len(full))
            at = next((i for i in range(shorter) if text[i] != full[i]), shorter)
            raise MaskProofError(
                f"{self.name}: the first {len(messages)} messages are rendered differently when more follow",
                text[max(0, at - 20) : at + 40],
            )
        return len(text)

    def _turn(self, text: str, message: Message, index: int) -> str:
        """The trained part of an assistant turn: content and end-of-turn token, without white space after it."""
        if message.tool_calls:
            return self._calling_turn(text, message, index)
        content = message.content
        for body in (content, content.strip()):  # some templates trim what they are given
            if text.startswith(body):
                rest = text[len(body) :]
                break
        else:
            raise MaskProofError(f"{self.name}: the turn does not begin with the content of messages[{index}]", text)
        mark = self._special.match(rest)
        if mark is None:
            raise MaskProofError(f"{self.name}: no end-of-turn token follows messages[{index}]", rest or text[-40:])
        if rest[mark.end() :].strip():
            raise MaskProofError(
                f"{self.name}: more than white space follows the end of messages[{index}]", rest[mark.end() :]
            )
        return body + mark.group()

    def _calling_turn(self, text: str, message: Message, index: int) -> str:
        """The trained part of a turn that calls tools, whose wording is the template's: up to its last special token.

        It must hold the content, then every call's name with each text and number of its arguments.
        """
        mark = next(iter(deque(self._special.finditer(text), maxlen=1)), None)
        if mark is None or text[mark.end() :].strip():
            raise MaskProofError(f"{self.name}: no end-of-turn token ends messages[{index}]", text[-40:])
        content = message.content.strip()
        at = self._find(content, text, 0, f"{content!r} of messages[{index}]")
        for call in message.tool_calls:
            at = self._find(call["name"], text, at, f"{call['name']!r} of messages[{index}]")
            for value in _leaves(call["arguments"]):
                self._find(value, text, at, f"the argument {value} of {call['name']} in messages[{index}]")
        return text[: mark.end()]

    def _find(self, part: str, text: str, at: int, what: str) -> int:
        found = text.find(part, at)
        if found < 0:
            raise MaskProofError(f"{self.name}: {what} is not in the text where it belongs", text)
        return found + len(part)

    def _expect_tools(self, full: str, messages: Sequence[Message], tools: Tools) -> None:
        """A template that ignores `tools` would train calls of functions that the model was never told of."""
        if full == self.render(messages):
            raise MaskProofError(f"{self.name}: does not show the {len(tools)} tools of the conversation", full[:80])

    def _expect(self, messages: Sequence[Message], indices: range, text: str) -> None:
        """Every message that is not trained must be in `text`, in order: the model has to see it."""
        at = 0
        for index in indices:
            content = messages[index].content.strip()
            found = text.find(content, at)
            if found < 0:
                raise MaskProofError(f"{self.name}: messages[{index}] is not in the text where it belongs", text)
            at = found + len(content)


def _leaves(value: Any) -> Iterator[str]:
    """Every text (as JSON writes it, without quotes) and number in a JSON value."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, str):
        yield json.dumps(value, ensure_ascii=False)[1:-1]
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, nothing added to them."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_conversations(
    tokenizer: Any,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    tools: Sequence[Tools] | None = None,
) -> list[Conversation | MaskProofError]:
    """Encode conversations with their masks; one whose mask cannot be proven comes back as the error. `tools` has one
    entry per conversation.

    The text is encoded span by span, as a model meets it (a prompt, then its own tokens), and once as a whole; both
    must give the same tokens, so that no token belongs to two spans.
    """
    proven: list[list[Span] | MaskProofError] = []
    for messages, known in zip(conversations, tools or [()] * len(conversations), strict=True):
        try:
            proven.append(template.spans(messages, known))
        except MaskProofError as error:
            proven.append(error)
    texts: list[str] = []
    for spans in proven:
        if not isinstance(spans, MaskProofError):
            texts += [span.text for span in spans] + ["".join(span.text for span in spans)]
    encoded = iter(encode_texts(tokenizer, texts))
    results: list[Conversation | MaskProofError] = []
    for spans in proven:
        if isinstance(spans, MaskProofError):
            results.append(spans)
            continue
        parts = [next(encoded) for _ in spans]
        results.append(_join(template, spans, parts, whole=next(encoded)))
    return results


def _join(
    template: ChatTemplate, spans: list[Span], parts: list[list[int]], whole: list[int]
) -> Conversation | MaskProofError:
    token_ids: list[int] = []
    mask: list[bool] = []
    starts: dict[int, int] = {}
    for index, (span, part) in enumerate(zip(spans, parts, strict=True)):
        same = whole[len(token_ids) : len(token_ids) + len(part)]
        if same != part:
            # A span differs at its end (merged with the next one) or at its start (encoded otherwise after another).
            border = index if same[:1] != part[:1] and index else min(index + 1, len(spans) - 1)
            return MaskProofError(
                f"{template.name}: the tokenizer merges text across the border of a turn",
                spans[border - 1].text[-20:] + spans[border].text[:20],
            )
        if span.message is not None:
            starts[span.message] = len(token_ids)
        token_ids += part
        mask += [span.message is not None] * len(part)
    if len(whole) != len(token_ids):
        return MaskProofError(f"{template.name}: the spans do not add up to the whole text", spans[-1].text)
    return Conversation(token_ids, mask, starts)


def encode_conversation(
    tokenizer: Any, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Token ids [n] of a conversation and its label mask [n].

    Raises:
        MaskProofError: the mask cannot be proven; it names the span.
    """
    (result,) = encode_conversations(tokenizer, template, [messages])
    if isinstance(result, MaskProofError):
        raise result
    return result.token_ids, result.mask


def render_prompt(template: ChatTemplate, messages: Sequence[Message], tools: Tools = ()) -> str:
    """The text that an answer continues.

    Raises:
        MaskProofError: the conversation already ends with an answer, holds the text of a special token, or the template
            marks no place for an answer.
    """
    template.refuse_special_tokens(messages, tools)
    if messages[-1].role == "assistant":
        raise MaskProofError("a prompt must not end with an assistant turn", messages[-1].content)
    text = template.render(messages, add_generation_prompt=True, tools=tools)
    if text == template.render(messages, tools=tools):
        raise MaskProofError(f"{template.name}: no generation prompt is added", text[-40:])
    return text


def encode_prompt(tokenizer: Any, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt with the generation prompt at its end.

    Raises:
        MaskProofError: as `render_prompt`.
    """
    return encode_texts(tokenizer, [render_prompt(template, messages)])[0]
