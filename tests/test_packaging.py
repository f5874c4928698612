"""The wheel carries what the command needs outside its checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_holds_recipes_manifests_and_the_command(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("ctseg-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    run = "from ctseg.cli import main; main()"
    for arguments, wanted in (
        (["recipes"], "spleen:small"),
        (["train", "spleen", "--manifest", "msd_spleen"], "Task09_Spleen"),
    ):
        script = f"import sys; sys.path.insert(0, 'site'); sys.argv[1:] = {arguments!r}; {run}"
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert wanted in result.stdout + result.stderr
    shipped = {str(path.relative_to(ROOT / "data" / "manifests")) for path in (ROOT / "data" / "manifests").iterdir()}
    assert {path.name for path in (tmp_path / "site" / "ctseg" / "manifests").iterdir()} == shipped
