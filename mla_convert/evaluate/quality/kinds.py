"""Names of the packaged suite's kinds of text. Imports no torch."""

# Each kind has a file mla_texts/suite/NAME.txt.gz; dialogue has a .jsonl.gz.
KINDS = (
    "prose",
    "dialogue",
    "mathematics",
    "python",
    "c",
    "javascript",
    "rust",
    "licences",
    "french",
    "german",
    "chinese",
)
