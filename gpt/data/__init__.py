"""Data: from texts to token ids to batches."""

from .batches import IGNORED, Batch, Batches, ContiguousBatches, RandomBatches
from .documents import PackedBatches, PaddedBatches
from .mapped import MappedTokens
from .pieces import read_pieces, texts_of
from .prefetch import Prefetched
from .samplers import Sampler, make_batches
from .text import Text, default_text, read_text, tinyshakespeare_path
from .token_file import TokenFile, TokenFileError, write_token_file
from .tokens import Documents, Split, Tokens, fingerprint, largest_id, split

__all__ = [
    "IGNORED",
    "Batch",
    "Batches",
    "ContiguousBatches",
    "Documents",
    "MappedTokens",
    "PackedBatches",
    "PaddedBatches",
    "Prefetched",
    "RandomBatches",
    "Sampler",
    "Split",
    "Text",
    "TokenFile",
    "TokenFileError",
    "Tokens",
    "default_text",
    "fingerprint",
    "largest_id",
    "make_batches",
    "read_pieces",
    "read_text",
    "split",
    "texts_of",
    "tinyshakespeare_path",
    "write_token_file",
]
