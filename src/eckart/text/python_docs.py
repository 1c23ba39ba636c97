"""The language reference inside Python: a text that is everywhere."""


def read_python_docs(half: str) -> list[str]:
    """The topics by name; the first half ends with the topic in which half of the characters are reached."""
    from pydoc_data.topics import topics  # a large module that most runs do not need

    texts = [text for _, text in sorted(topics.items())]
    total, seen, cut = sum(map(len, texts)), 0, 0
    while 2 * seen < total:
        seen += len(texts[cut])
        cut += 1
    return {"first": texts[:cut], "second": texts[cut:], "all": texts}[half]
