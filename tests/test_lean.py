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


def test_a_command_imports_no_other_command() -> None:
    program = """
import sys
from ctseg.cli import main
sys.argv = ["ctseg", "infer", "--help"]
try:
    main()
except SystemExit:
    print(*sorted(name for name in sys.modules if name.startswith("ctseg.commands.")))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1].split() == ["ctseg.commands.common", "ctseg.commands.infer"]
