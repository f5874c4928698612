"""Mutated image files: each is read as a volume that makes sense, or refused in one line. Nothing else ever happens."""

import gzip
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ctseg.errors import ImageError
from ctseg.io.images import read_geometry, read_image, read_labels, write_image
from ctseg.volume import Geometry, Volume

MUTANTS = 400
EXTREMES = [
    bytes(4),
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\x80\0\0\0",
]
"""0, -1, the largest integers of both byte orders, NaN, infinity, the smallest integer."""
WORDS = [b"-1", b"0", b"nan", b"inf", b"1e308", b"99999999999", b"", b"(", b"\xff", b"\n\n", b"%s", b"../../x", b"None"]


def overwrite(data: bytearray, chance: random.Random, header: int) -> None:
    at = chance.randrange(header)
    data[at : at + 4] = chance.choice(EXTREMES)


def flip_bits(data: bytearray, chance: random.Random, header: int) -> None:
    for _ in range(chance.randrange(1, 8)):
        data[chance.randrange(header)] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random, header: int) -> None:
    del data[chance.randrange(len(data)) :]


def remove(data: bytearray, chance: random.Random, header: int) -> None:
    at = chance.randrange(header)
    del data[at : at + chance.randrange(1, 40)]


def repeat(data: bytearray, chance: random.Random, header: int) -> None:
    at = chance.randrange(header)
    data[at:at] = data[at : at + chance.randrange(1, 40)] * chance.randrange(1, 50)


def insert_word(data: bytearray, chance: random.Random, header: int) -> None:
    at = chance.randrange(header)
    data[at : at + chance.randrange(4)] = chance.choice(WORDS)


MUTATIONS: list[Callable[[bytearray, random.Random, int], None]] = [
    overwrite,
    flip_bits,
    cut,
    remove,
    repeat,
    insert_word,
]


def mutants(data: bytes, header: int, seed: int) -> Iterator[bytes]:
    """`MUTANTS` variants of a file whose first `header` bytes say what the rest is; a few are mutated twice."""
    chance = random.Random(seed)
    for _ in range(MUTANTS):
        mutant = bytearray(data)
        for _ in range(chance.choice((1, 1, 2))):
            chance.choice(MUTATIONS)(mutant, chance, min(header, len(mutant)) or 1)
            mutant = mutant or bytearray(1)
        yield bytes(mutant)


@pytest.fixture
def ct() -> Volume:
    geometry = Geometry.from_parts((9, 8, 7), (0.7, 0.8, 2.5), (-12.0, 30.0, 100.0), np.eye(3))
    array = np.random.default_rng(1).integers(-1024, 2000, geometry.size).astype(np.int16)
    return Volume(np.asfortranarray(array), geometry)


def outcome(path: Path, read: Callable[[Path], Volume]) -> str:
    """Either "read" or "refused"; anything else that happens is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            volume = read(path)
        except ImageError as error:
            refusal = str(error)
        else:
            check(volume, path)
            return "read"
    assert str(path) in refusal
    assert "\n" not in refusal
    return "refused"


def check(volume: Volume, path: Path) -> None:
    assert volume.array.shape == volume.geometry.size
    assert np.isfinite(volume.geometry.affine).all()
    assert min(volume.geometry.spacing_mm) > 0
    assert np.isfinite(volume.array).all()
    assert volume.geometry.size == read_geometry(path).size


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("read", [read_image, read_labels])
def test_a_mutated_file_is_read_or_refused(
    ct: Volume, tmp_path: Path, suffix: str, read: Callable[[Path], Volume]
) -> None:
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"mutant{suffix}"
    write_image(whole, ct)
    data = whole.read_bytes()
    packed = suffix == ".nii.gz"
    header = 352 if packed or suffix == ".nii" else data.index(b"\n\n" if suffix == ".nrrd" else b"LOCAL") + 8
    found = []
    for mutant in mutants(gzip.decompress(data) if packed else data, header, seed=len(suffix)):
        path.write_bytes(gzip.compress(mutant, 1) if packed else mutant)
        found.append(outcome(path, read))
    assert "refused" in found
    if read is read_image:
        assert "read" in found, "every mutant was refused: the mutations are too coarse to test anything"


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_damage_in_the_compressed_voxels_never_goes_unnoticed(ct: Volume, tmp_path: Path, suffix: str) -> None:
    """Whatever bit is flipped after the header: the checksum tells, or the voxels are still the same."""
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"mutant{suffix}"
    write_image(whole, ct)
    data = whole.read_bytes()
    begin = {".nii.gz": 10, ".nrrd": data.find(b"\n\n") + 2, ".mha": data.find(b"LOCAL") + 6}[suffix]
    chance, refused = random.Random(3), 0
    for _ in range(MUTANTS):
        mutant = bytearray(data)
        mutant[chance.randrange(begin, len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(mutant)
        try:
            np.testing.assert_array_equal(read_image(path).array, ct.array)
        except ImageError:
            refused += 1
    assert refused > MUTANTS * 0.9
