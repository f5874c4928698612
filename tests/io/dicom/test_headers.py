"""pydicom is silent while any thread wants it to be, and as before afterwards."""

import warnings

import pydicom

from ctseg.io.dicom.silence import pydicom_silent


def test_silence_lasts_until_the_last_thread_leaves() -> None:
    """A CT is read in one thread while a mask is written in another; they do not leave in the order they came."""
    settings, before = pydicom.config.settings, list(warnings.filters)
    mode = settings.reading_validation_mode
    reader, writer = pydicom_silent(), pydicom_silent()
    reader.__enter__()
    writer.__enter__()
    reader.__exit__(None, None, None)
    assert settings.reading_validation_mode == pydicom.config.IGNORE
    warnings.warn("is not told", stacklevel=1)
    writer.__exit__(None, None, None)
    assert settings.reading_validation_mode == mode != pydicom.config.IGNORE
    assert list(warnings.filters) == before
