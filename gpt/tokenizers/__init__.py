"""Text to token ids and back: by characters, by byte pairs, by SentencePiece; one interface, no network."""

from .byte_pair import BytePairTokenizer
from .characters import CharTokenizer
from .choose import NAMES, make_tokenizer, tokenizer_from_dict
from .interface import Tokenizer, decode, encode_documents
from .published import TiktokenTokenizer
from .sentence_piece import SentencePieceTokenizer

__all__ = [
    "NAMES",
    "BytePairTokenizer",
    "CharTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "decode",
    "encode_documents",
    "make_tokenizer",
    "tokenizer_from_dict",
]
