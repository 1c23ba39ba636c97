"""Foreign text, made fit for one line of a terminal."""


def plain(text: object, limit: int = 300) -> str:
    """The text on one line and harmless to show: at most `limit` characters, nothing in them that is not printed.

    Line breaks, control characters, halves of surrogate pairs and what turns the direction of writing become escapes
    such as `\\x1b`.
    """
    try:
        whole = str(text)
    except ValueError:  # Python writes no number of more than 4,300 digits
        whole = f"({type(text).__name__} of too many digits)"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: max(limit - 4, 0)]} ..."[:limit]
