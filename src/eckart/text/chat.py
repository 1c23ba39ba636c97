"""Chats become text: by the tokenizer's chat template, or without one as roles and text.

A chat is a list of messages, written as `role` and `content` or, as in ShareGPT, as `from` and `value`. Content may be
a list of parts; those of text are joined by newlines, and others (images) are refused. The BOS token that a template
puts before a chat is taken off: where one stands is the choice of `bos`, for chats as for every text.
"""

from collections.abc import Mapping
from typing import Any

from eckart.errors import DataError
from eckart.text.foreign import first_line, shown

BY_TEMPLATE, BY_ROLES = "chat template", "roles and text"

ROLES = {  # of ShareGPT and its relatives; other names are roles already
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
# Templates that write today's date would give other windows tomorrow; Llama's own fall back on this one.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


def is_chat(value: Any) -> bool:
    """Whether a value is laid out as a chat of one message or more."""
    return isinstance(value, list) and len(value) > 0 and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and (_says(value, "role", "content") or _says(value, "from", "value"))


def _says(message: Mapping[str, Any], speaker: str, words: str) -> bool:
    return isinstance(message.get(speaker), str) and (words in message or "tool_calls" in message)


def rendering_of(tokenizer: Any) -> str:
    """How this tokenizer's chats become text."""
    return BY_TEMPLATE if getattr(tokenizer, "chat_template", None) else BY_ROLES


def render(tokenizer: Any, chat: Any, tools: Any, place: str) -> str:
    """The text of a chat with the tools that its row names. Raises `DataError` with the place for what is no chat."""
    if not is_chat(chat):
        raise DataError(
            f"{place} is {shown(chat)}, but must be a chat: a list of objects with 'role' and 'content', "
            "or with 'from' and 'value'."
        )
    messages = [_message(message, f"{place}, message {number},") for number, message in enumerate(chat, 1)]
    if rendering_of(tokenizer) == BY_ROLES:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    text = _by_template(tokenizer, messages, tools or None, place)
    return text.removeprefix(getattr(tokenizer, "bos_token", None) or "")


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message with `role`, `content` as a string, and what else it has besides nulls."""
    if _says(message, "role", "content"):
        role, content = message["role"], message.get("content")
        rest = {key: value for key, value in message.items() if value is not None}
    else:
        role, content, rest = ROLES.get(message["from"], message["from"]), message.get("value"), {}
    return {**rest, "role": role, "content": _words(content, place)}


def _words(content: Any, place: str) -> str:
    """Content as one string; nothing where a message only calls tools."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{place} says {shown(content)}, but must say a string or a list of parts.")
    return "\n".join(_part(part, place) for part in content)


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    if isinstance(text, str):
        return text
    kind = shown(part.get("type", part) if isinstance(part, dict) else part)
    raise DataError(f"{place} has a part of type {kind}, but only parts of text can be read; leave such rows out.")


def _by_template(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, place: str) -> str:
    try:
        options: dict[str, Any] = {}
        if "strftime_now" in str(tokenizer.chat_template):  # one template, or several by name
            options["chat_template"] = FIXED_DATE + tokenizer.get_chat_template(tools=tools)
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except Exception as error:  # a template is a program, which may end in any way
        said = first_line(error)
        raise DataError(f"{place}: the chat template refuses it: {said}; mend the row or leave it out.") from None
    return str(text)
