"""JPEG with 12 bits, the one kind of compressed CT that no decoder of pydicom's unpacks; GDCM does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import ImageError

SYNTAXES = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55")
"""Extended, and the retired spectral selection and full progression; with 8 bits the first is anyone's."""


def decode(frame: bytes, syntax: str, size: tuple[int, int]) -> NDArray[np.uint16]:
    """The stored pixels `[y, x]` of one compressed frame of 12 bits.

    Args:
        frame: The codestream.
        syntax: One of SYNTAXES.
        size: Columns, rows, as the codestream says too.

    Raises:
        ImageError: if GDCM cannot unpack it.
    """
    import gdcm  # type: ignore[import-untyped]

    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()
    columns, rows = size
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(frame)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, 0))
    data = image.GetBuffer()
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else b""
    if len(raw) != 2 * columns * rows:
        raise ImageError(
            "its 12-bit JPEG cannot be unpacked; copy it again, or convert it to Explicit VR Little Endian"
        )
    return np.frombuffer(raw, np.uint16).reshape(rows, columns)
