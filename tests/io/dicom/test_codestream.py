"""Headers of lossless JPEG over which a decoder ends the process, or guesses, are refused before it sees them."""

import pytest

from ctseg.errors import ImageError
from ctseg.io.dicom.codestream import check_codestream


def jpeg(version: int = 1, counts: tuple[int, ...] = (0, 1, 5)) -> bytes:
    """The header of a lossless JPEG of 4 x 2 pixels of 16 bits, with Huffman codes of 1, 2, 3 bits."""
    jfif = b"JFIF\0" + bytes([version, 1, 0, 0, 1, 0, 1, 0, 0])
    frame = bytes([16, 0, 2, 0, 4, 1, 1, 0x11, 0])
    table = bytes([0, *counts, *[0] * (16 - len(counts)), *range(sum(counts))])
    scan = bytes([1, 1, 0, 1, 0, 0])
    segments = ((0xE0, jfif), (0xC3, frame), (0xC4, table), (0xDA, scan))
    parts = (bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data for marker, data in segments)
    return b"\xff\xd8" + b"".join(parts) + b"\0\0\xff\xd9"


def test_an_ordinary_header_tells_its_bits() -> None:
    assert check_codestream(jpeg(), (4, 2), 16) == 16


@pytest.mark.parametrize("version", [0, 2, 0x1E])
def test_another_version_of_jfif_over_which_gdcm_ends_the_process_is_refused(version: int) -> None:
    with pytest.raises(ImageError, match="the markers of its JPEG are damaged"):
        check_codestream(jpeg(version), (4, 2), 16)


@pytest.mark.parametrize("counts", [(3,), (2, 1), (0, 5), (1, 2, 1)])
def test_more_huffman_codes_than_there_are_is_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="the markers of its JPEG are damaged"):
        check_codestream(jpeg(counts=counts), (4, 2), 16)


@pytest.mark.parametrize("counts", [(1, 1, 1), (0, 4), (2,), (0, 1, 6)])
def test_all_codes_that_there_are_may_be_used(counts: tuple[int, ...]) -> None:
    assert check_codestream(jpeg(counts=counts), (4, 2), 16) == 16
