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


def test_no_garbage_is_looked_for_while_importing_and_what_began_is_frozen_in_a_process_of_its_own() -> None:
    program = """
import gc
from ctseg.lean import importing
with importing():
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() == 0
import ctseg.__main__
assert gc.isenabled() and gc.get_freeze_count() > 10_000
before = gc.get_freeze_count()
with importing():
    more = [[] for _ in range(1000)]
assert gc.isenabled() and gc.get_freeze_count() >= before + 1000
gc.disable()
with importing():
    pass
assert not gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_only_the_program_keeps_things_to_its_end() -> None:
    program = """
import weakref
from ctseg.lean import keep_to_the_end
class Network: pass
def kept():
    network = Network()
    keep_to_the_end(network)
    return weakref.ref(network)
assert kept()() is None
import ctseg.__main__
assert kept()() is not None
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


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
