"""The reference GPT: from text to a trained model to generated text, on the kernels of `trilby.kernels`."""

from .bigram import Bigram
from .checkpoint import Checkpoint, CheckpointError, save_checkpoint
from .config import PRESETS, GPTConfig, TrainConfig, parameter_count
from .data import Split, Text, default_text, read_text, split
from .generate import generate, generate_texts, stream, stream_text
from .layers import PYTORCH, TRILBY, Layers
from .model import GPT
from .pretrained import load_pretrained, save_pretrained
from .sampling import GREEDY, Sampling
from .tokenizers import (
    BytePairTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    decode,
    encode_documents,
)
from .train import Result, Step, Training, evaluate, train
from .weights import hold

__all__ = [
    "GPT",
    "GREEDY",
    "PRESETS",
    "PYTORCH",
    "TRILBY",
    "Bigram",
    "BytePairTokenizer",
    "CharTokenizer",
    "Checkpoint",
    "CheckpointError",
    "GPTConfig",
    "Layers",
    "Result",
    "Sampling",
    "SentencePieceTokenizer",
    "Split",
    "Step",
    "Text",
    "TiktokenTokenizer",
    "Tokenizer",
    "TrainConfig",
    "Training",
    "decode",
    "default_text",
    "encode_documents",
    "evaluate",
    "generate",
    "generate_texts",
    "hold",
    "load_pretrained",
    "parameter_count",
    "read_text",
    "save_checkpoint",
    "save_pretrained",
    "split",
    "stream",
    "stream_text",
    "train",
]
