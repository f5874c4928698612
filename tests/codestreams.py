"""Compressed images for tests: one frame as a DICOM data set, its pixels by a decoder of pydicom's, and damage."""

import random
import warnings
from typing import Any

import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder


def dataset(frame: bytes, syntax: str, shape: tuple[int, int], bits: int, signed: bool) -> pydicom.Dataset:
    """As little as a decoder needs; `shape` is rows, columns."""
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.Rows, made.Columns = shape
    made.BitsAllocated, made.BitsStored, made.HighBit = (8 if bits <= 8 else 16), bits, bits - 1
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.PixelRepresentation = int(signed)
    made.PixelData = encapsulate([frame])
    return made


def decoded(made: pydicom.Dataset, plugin: str) -> NDArray[Any]:
    """The stored pixels as a plugin unpacks them."""
    return get_decoder(made.file_meta.TransferSyntaxUID).as_array(made, raw=True, decoding_plugin=plugin)[0]


def outcome(made: pydicom.Dataset, plugin: str) -> NDArray[Any] | None:
    """The same; None where the plugin refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decoded(made, plugin)
    except Exception:
        return None


def damaged(frame: bytes, code: int, longest: int, chance: random.Random) -> bytes:
    """A codestream cut short, with a changed byte in its headers or a bit in its code, or a run of changed bytes.

    Args:
        frame: The codestream.
        code: Where its headers end.
        longest: A run of bytes that are zeroed, made up, added or left out has at most so many.
        chance: Decides.
    """
    data = bytearray(frame)
    place, length = chance.randrange(code, len(data) - 2), chance.choice([1, 2, 16, longest])
    match chance.randrange(7):
        case 0:
            del data[-chance.choice([1, 2, 3, 4, 8, chance.randrange(1, len(data) - code)]) :]
        case 1:
            data[chance.randrange(2, code)] = chance.randrange(256)
        case 2:
            data[place] ^= 1 << chance.randrange(8)
        case 3:
            data[place : place + length] = bytes(length)
        case 4:
            data[place : place + length] = chance.randbytes(length)
        case 5:
            data[place:place] = chance.randbytes(length)
        case _:
            del data[place : place + length]
    return bytes(data)
