"""What is imported without what it brings along is whole all the same."""

import subprocess
import sys

PROGRAM = """
import sys
from ctseg.lean import import_nibabel_alone
import_nibabel_alone()
assert "nibabel" in sys.modules and "pydicom" not in sys.modules
import_nibabel_alone()
import pydicom
from nibabel.nifti1 import Nifti1Header
assert pydicom.dcmread and Nifti1Header
"""


def test_nibabel_comes_without_pydicom_which_can_be_imported_later() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
