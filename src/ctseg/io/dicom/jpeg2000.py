"""JPEG 2000 by imagecodecs, as a decoder of pydicom's: several files are unpacked at a time.

It calls the OpenJPEG that pylibjpeg calls, with the same strictness, but lets go of the interpreter's lock meanwhile.
"""

from __future__ import annotations

from importlib.util import find_spec

from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import JPEG2000, JPEG2000Lossless

NAME = "imagecodecs"
DECODER_DEPENDENCIES = {JPEG2000Lossless: (NAME,), JPEG2000: (NAME,)}
"""What pydicom asks a decoder for: what it needs, by transfer syntax."""


def is_available(uid: str) -> bool:
    """Whether it can unpack a transfer syntax here."""
    return uid in DECODER_DEPENDENCIES and find_spec(NAME) is not None


def decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """The pixels of one grey codestream.

    Raises:
        ValueError: if they are not as many as promised, or in colour.
    """
    import imagecodecs

    stored = imagecodecs.jpeg2k_decode(src, numthreads=1)
    if stored.shape != (runner.rows, runner.columns):
        raise ValueError(f"unpacked to {stored.shape}, its header promises {(runner.rows, runner.columns)}")
    runner.set_option("bits_allocated", 8 * stored.itemsize)
    return bytes(stored.tobytes())


for _syntax in DECODER_DEPENDENCIES:
    get_decoder(_syntax).add_plugin(NAME, (__name__, decode_frame.__name__))
