"""Data: from texts to token ids to batches."""

from .batches import Batches, ContiguousBatches, RandomBatches, make_batches
from .text import Text, default_text, read_text, tinyshakespeare_path
from .tokens import Split, split

__all__ = [
    "Batches",
    "ContiguousBatches",
    "RandomBatches",
    "Split",
    "Text",
    "default_text",
    "make_batches",
    "read_text",
    "split",
    "tinyshakespeare_path",
]
