"""File names made from DICOM: safe whatever a header says, and the same when the archive grows."""

from pathlib import Path

import pydicom
import pytest

from ctseg.io.dicom.names import series_name
from ctseg.io.dicom.read import find_series
from ctseg.io.dicom.series import Series
from ctseg.privacy import KEY_VARIABLE
from dicom_maker import Plan, write_series

UID = "1.2.3.4.5.6"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 40)


def names(folder: Path, *, keep: bool) -> dict[int, str]:
    """The acquisition of each series -> its name."""
    found = find_series([folder]).series
    return {int(one.value("AcquisitionNumber")): series_name(one, found, keep_identifiers=keep) for one in found}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("uid", ["../../PWNED", "/tmp/x", "", ".1.2", "1.2\n", "a" * 70, "..", "1.2.3 "])
@pytest.mark.parametrize("keep", [True, False])
def test_no_uid_leads_out_of_the_folder_or_hides_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: str, keep: bool
) -> None:
    (series,) = find_series([write_series(tmp_path, Plan())]).series
    hostile = Series(**{**vars(series), "uid": uid})
    name = series_name(hostile, [hostile], keep_identifiers=keep)
    assert name.startswith("ct-")
    assert name[3:].isalnum()


@pytest.mark.parametrize("keep", [True, False])
def test_parts_of_one_uid_keep_their_names_when_others_come(tmp_path: Path, keep: bool) -> None:
    """Whichever comes first in the list."""

    def add(folder: str, acquisition: int) -> None:
        def change(dataset: pydicom.Dataset, n: int) -> None:
            dataset.AcquisitionNumber = acquisition

        tags = {"SeriesInstanceUID": UID, "StudyInstanceUID": "1.2.3.7", "FrameOfReferenceUID": "1.2.3.8"}
        write_series(tmp_path / folder, Plan(tags=tags, hu=lambda points: points[..., 2] + acquisition, change=change))

    add("m", 5)
    assert names(tmp_path, keep=True) == {5: UID}
    add("n", 6)
    before = names(tmp_path, keep=keep)
    assert len(before) == 2
    add("a", 1)
    add("z", 9)
    after = names(tmp_path, keep=keep)
    assert len(set(after.values())) == 4
    assert {acquisition: after[acquisition] for acquisition in before} == before
    assert all(name.startswith(f"{UID}-" if keep else "ct-") for name in after.values())


def test_series_without_a_uid_are_told_apart(tmp_path: Path) -> None:
    made = []
    for n in range(2):
        folder = write_series(tmp_path / str(n), Plan(drop=["SeriesInstanceUID"]))
        made += names(folder, keep=False).values()
    assert len(set(made)) == 2
