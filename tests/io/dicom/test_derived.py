"""What objects made from a CT say about its images."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ctseg.io.dicom.derived import instance
from ctseg.io.dicom.read import find_series


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_images_without_a_uid_get_one_each_whatever_their_files_are_called(
    series_plan, make_series: Callable[..., Path]
):
    """Names in messages lose their UIDs, and then are all the same; made-up UIDs must not be."""

    def without_uid(dataset, n: int) -> None:
        del dataset.SOPInstanceUID
        dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3."

    folder = make_series(series_plan(change=without_uid))
    for n, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"1.2.840.99999.1.{n}")
    (series,) = find_series(sorted(folder.iterdir())).series
    uids = [instance(image)[1] for image in series]
    assert len(set(uids)) == 6
    assert uids == [instance(image)[1] for image in series]
