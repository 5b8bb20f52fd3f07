"""From messages to tokens and from tokens to padded batches.

A *query* is the chat template's rendering of the messages up to the point where the assistant speaks; a
*response* is what the assistant says, with the template's end token where it came to an end. Batches are
padded on the right and cut to similar lengths: causal attention never looks at what comes later, so right
padding needs neither a mask nor position ids, and any token serves as padding.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_REFUSALS = TemplateError, AttributeError, TypeError, ValueError, LookupError
"""What a template raises that will not have some messages."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One query with one response to it, as token ids."""

    query: tuple[int, ...]
    response: tuple[int, ...]
    finished: bool
    """Whether the response stopped by itself; its last token is then an end token."""
    sampler_logprobs: tuple[float, ...] | None = None
    """What a sampler outside the trainer says of each response token, in nats."""

    def __post_init__(self) -> None:
        if not self.query or not self.response:
            raise ValueError("an answer needs at least one query token and one response token")

    def __len__(self) -> int:
        return len(self.query) + len(self.response)


@dataclass(frozen=True, slots=True)
class Batch:
    """B answers padded to T tokens, and where their R response tokens are."""

    input_ids: Tensor  # (B, T)
    columns: Tensor  # (B, R) the column whose hidden state predicts the response token
    response: Tensor  # (B, R) the response tokens, 0 in the padding
    mask: Tensor  # (B, R) True on response tokens
    spans: Tensor  # (B, K, 2) first and last column of each response in the row; K is 1 but for pairs
    attention_mask: Tensor | None = None  # (B, T) where there is padding on the left, or (B, 1, T, T)
    position_ids: Tensor | None = None  # (B, T), counted from 0 where None


def collate(answers: Sequence[Answer], device: torch.device | str = "cpu") -> Batch:
    """Pad on the right, to the longest answer and no further."""
    queries = torch.tensor([len(a.query) for a in answers], device=device)
    responses = torch.tensor([len(a.response) for a in answers], device=device)
    steps = torch.arange(int(responses.max()), device=device)
    mask = steps < responses[:, None]
    return Batch(
        input_ids=pad([a.query + a.response for a in answers], 0, device),
        columns=torch.where(mask, queries[:, None] - 1 + steps, 0),
        response=pad([a.response for a in answers], 0, device),
        mask=mask,
        spans=torch.stack([queries, queries + responses - 1], dim=1)[:, None],
    )


def collate_pairs(chosen: Sequence[Answer], rejected: Sequence[Answer], device: torch.device | str = "cpu") -> Batch:
    """Rows of query, chosen and rejected response, where neither response sees the other.

    The batch is that of the chosen answers, but for `spans`, which are those of both.
    """
    rows = [c.query + c.response + r.response for c, r in zip(chosen, rejected, strict=True)]
    input_ids = pad(rows, 0, device)
    batch = collate(chosen, device)
    start, end = batch.spans[:, 0, :1], batch.spans[:, 0, 1:]  # (B, 1) each
    column = torch.arange(input_ids.shape[1], device=device)
    in_rejected = column > end
    in_chosen = ~in_rejected & (column >= start)
    unseen = in_rejected[:, :, None] & in_chosen[:, None, :]
    causal = column[:, None] >= column
    ends = torch.tensor([len(row) - 1 for row in rows], device=device)
    return replace(
        batch,
        input_ids=input_ids,
        spans=torch.stack([batch.spans[:, 0], torch.stack([end[:, 0] + 1, ends], dim=1)], dim=1),
        attention_mask=(causal & ~unseen)[:, None],
        position_ids=torch.where(in_rejected, column - (end + 1 - start), column),
    )


def pad(rows: Sequence[Sequence[float]], fill: float, device: torch.device | str = "cpu") -> Tensor:
    """(B, longest) of the rows, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)


def by_length(lengths: Sequence[int], budget: int, *, rows: float = math.inf) -> list[list[int]]:
    """Indices in groups of similar length, each group padded at most `budget` tokens (or one row), and at most `rows`
    of them."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and len(groups[-1]) < rows and (len(groups[-1]) + 1) * lengths[i] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _text(content: str | list[dict[str, str]] | None) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())


def _parts(content: str | list[dict[str, str]] | None) -> list[dict[str, str]]:
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    return [{"type": "text", "text": text} for text in texts]


def _parsed(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which are empty where the string is no JSON object."""
    parsed = []
    for call in calls:
        function = call.get("function")
        if call.get("type", "function") != "function" or not isinstance(function, dict):
            raise ValueError("tool_calls are of type 'function'")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                arguments = {}
        parsed.append(call | {"function": function | {"arguments": arguments if isinstance(arguments, dict) else {}}})
    return parsed


class BadMessages(ValueError):
    """The chat template will not have these messages."""


class ChatFormat:
    """A tokenizer with a chat template, and the tokens that end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> None:
        """
        Args:
            end_ids: the tokens at which a sampler stops, at least one (`Backbone.end_ids`).

        Raises:
            ValueError: the tokenizer has no chat template, or one that leaves out what a user says.
        """
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use a chat model")
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        probe = "What is new?"
        text, parts = self._rendered(probe), self._rendered(_parts(probe))
        # vLLM gives parts to every template that takes them, though it may take strings as well.
        self._in_parts = text == parts or probe not in text
        if probe not in (parts if self._in_parts else text):
            raise ValueError(
                f"{tokenizer.name_or_path}: the chat template leaves out what a user says, as a string and in parts"
            )
        # The template itself shows which of them closes a turn.
        turn = [self._plain({"role": role, "content": "a"}) for role in ("user", "assistant")]
        rendered = tokenizer.apply_chat_template(turn, return_dict=False)
        self.end_id: int = next((t for t in reversed(rendered) if t in end_ids), min(end_ids))

    def _rendered(self, content: str | list[dict[str, str]]) -> str:
        """A user's message as the template writes it; nothing where it takes no such content."""
        message: Message = {"role": "user", "content": content}
        try:
            return str(self.tokenizer.apply_chat_template([message], tokenize=False))
        except _REFUSALS:
            return ""

    def _plain(self, message: Message) -> Message:
        """A copy as vLLM would give it to the template."""
        role, content = message.get("role"), message.get("content")
        plain = message | {"content": _parts(content) if self._in_parts and role != "tool" else _text(content)}
        if role == "assistant" and isinstance(calls := plain.pop("tool_calls", None), list) and calls:
            plain["tool_calls"] = _parsed(calls)
        return plain

    def query(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens after which the assistant speaks, as vLLM has them: for a template that takes strings the parts of
        a content are joined by newlines, and no content is an empty one; the arguments of tool calls are parsed.

        Raises:
            BadMessages
        """
        try:
            plain = [self._plain(message) for message in messages]
            tokens = self.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        except _REFUSALS as error:
            raise BadMessages(f"the chat template does not take these messages: {error}") from error
        return tuple(tokens)

    def answer(
        self, messages: Sequence[Message], text: str, *, finished: bool = True, query: tuple[int, ...] | None = None
    ) -> Answer:
        """A stored text as the tokens of an answer, closed by the end token if it had finished. Raises BadMessages.

        Args:
            query: of these messages, where it is known.
        """
        response = self.tokenizer.encode(text, add_special_tokens=False)
        if finished or not response:
            response = [*response, self.end_id]
        return Answer(self.query(messages) if query is None else query, tuple(response), finished)

    def text(self, answer: Answer) -> str:
        """What a reader sees of the response."""
        return str(self.tokenizer.decode(list(answer.response), skip_special_tokens=True))
