"""Foreign text made harmless before a person or a terminal sees it."""


def plain(text: object, limit: int = 300) -> str:
    r"""Text in one line of at most `limit` characters, with everything invisible written out.

    Control characters (line breaks and tabs too), lone surrogates, marks of writing direction, zero-width characters
    and unusual spaces become escapes such as `\x1b` and `\u202e`; what is cut off is shown as " ...".
    """
    try:
        whole = str(text)
    except ValueError:  # Python writes no number of more than 4,300 digits
        whole = f"({type(text).__name__} of too many digits)"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: max(limit - 4, 0)]} ..."[:limit]
