"""How the tests and the interpreter's process talk: one pickled message after another, its length first."""

import io
import struct
from typing import Any, BinaryIO

import torch


def send(stream: BinaryIO, message: Any) -> None:
    """Write one message; tensors arrive with the strides they left with."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(struct.pack("<Q", buffer.tell()))
    stream.write(buffer.getvalue())
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Wait for one message; EOFError when the other side has ended."""
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("the other side has ended")
    return torch.load(io.BytesIO(stream.read(struct.unpack("<Q", header)[0])), weights_only=False)
