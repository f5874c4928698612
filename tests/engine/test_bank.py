"""Prepared cases: what they hold, when they are made again, and what a bad case or a kill leaves behind."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import CropForeground

from ctseg.engine import bank
from ctseg.engine.bank import Room, bank_fingerprint, bank_folder, case_folder, open_bank, prepare_bank, read_case
from ctseg.errors import CtsegError, ImageError, ManifestError, Stopped
from ctseg.io.images import read_image, read_labels, write_labels
from ctseg.manifest import Case, Manifest
from ctseg.preprocess import prepare, prepare_labels
from ctseg.progress import Silent
from ctseg.recipe import Recipe, load_recipe
from ctseg.sampling import CaseArrays
from ctseg.sources.phantom import centered_grid, make_phantom
from ctseg.volume import Volume

CPU = torch.device("cpu")


@pytest.fixture
def own_case(tmp_path: Path, write_ct) -> Case:
    """A case whose files a test may change: 20 x 16 x 12 voxels of 10 mm, flipped axes."""
    grid = centered_grid((20, 16, 12), (10.0, 10.0, 10.0), "RAS")
    phantom = make_phantom(1, 0, grid=grid)
    image, label = tmp_path / "ct.nii.gz", tmp_path / "ct_label.nii.gz"
    write_ct(image, phantom.image)
    write_labels(label, phantom.labels().array, grid)
    return Case(name="ct", split="training", image=image, label=label)


def open_one(case: Case, recipe: Recipe, root: Path) -> CaseArrays:
    (opened,) = open_bank((case,), bank_folder(root, recipe), CPU)
    return opened


def age(path: Path) -> None:
    """Makes a file look changed, whatever the clock's resolution."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def test_content_is_that_of_the_pipeline(tiny_manifest: Manifest, tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Against preparing by hand and MONAI's crop; every case, as their axes differ."""
    cases = tiny_manifest.split("training")
    report = prepare_bank(cases, tiny_recipe, tmp_path, Silent())
    assert report.made == ("case_0", "case_1", "case_2")
    for case, arrays in zip(cases, open_bank(cases, report.folder, CPU), strict=True):
        image = prepare(read_image(case.image), tiny_recipe.preprocess, CPU).image_XYZ
        label = torch.from_numpy(prepare_labels(read_labels(case.label), tiny_recipe.preprocess))
        crop = CropForeground(select_fn=lambda x: x > 0, allow_smaller=True)
        start, end = crop.compute_bounding_box(image[None])
        box = tuple(slice(int(s), int(e)) for s, e in zip(start, end, strict=True))
        assert image[box].shape != image.shape  # there is something to crop
        assert arrays.image_XYZ.dtype == torch.float16
        assert arrays.image_XYZ.shape == image[box].shape
        # Half a unit in the last place of a float16 in 0.5..1 is 2 ** -12; smaller values are rounded less.
        assert (arrays.image_XYZ.float() - image[box]).abs().max() <= 2**-12
        assert arrays.label_XYZ.dtype == torch.uint8
        assert torch.equal(arrays.label_XYZ, label[box])
        assert arrays.label_XYZ.any()
        expected = np.ravel_multi_index(np.nonzero(label[box].numpy()), tuple(label[box].shape))
        np.testing.assert_array_equal(arrays.foreground, expected)
        assert arrays.foreground.dtype == np.int32
        np.testing.assert_array_equal(arrays.host_image, arrays.image_XYZ.numpy())
        np.testing.assert_array_equal(arrays.host_label, arrays.label_XYZ.numpy())


def test_without_the_crop_the_whole_grid_is_kept(own_case: Case, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        tiny_recipe, preprocess=dataclasses.replace(tiny_recipe.preprocess, crop_foreground=False)
    )
    prepare_bank((own_case,), recipe, tmp_path, Silent())
    image = prepare(read_image(own_case.image), recipe.preprocess, CPU).image_XYZ
    assert open_one(own_case, recipe, tmp_path).image_XYZ.shape == image.shape


def test_cases_are_memory_mapped_and_the_files_are_not_changed(own_case, tiny_recipe, tmp_path: Path) -> None:
    report = prepare_bank((own_case,), tiny_recipe, tmp_path, Silent())
    arrays = open_one(own_case, tiny_recipe, tmp_path)
    assert isinstance(arrays.host_image, np.memmap)
    assert isinstance(arrays.host_label, np.memmap)
    assert arrays.image_XYZ.data_ptr() == arrays.host_image.ctypes.data
    before = (case_folder(report.folder, own_case) / "image.npy").read_bytes()
    arrays.image_XYZ.fill_(9)
    assert (case_folder(report.folder, own_case) / "image.npy").read_bytes() == before


def test_report_counts_the_bytes_on_disk(own_case: Case, tiny_recipe: Recipe, tmp_path: Path) -> None:
    report = prepare_bank((own_case,), tiny_recipe, tmp_path, Silent())
    assert report.num_bytes == sum(f.stat().st_size for f in report.folder.rglob("*") if f.is_file())


def test_ready_cases_are_left_alone(tiny_manifest: Manifest, tiny_recipe: Recipe, tmp_path: Path) -> None:
    cases = tiny_manifest.split("training")
    folder = prepare_bank(cases[:2], tiny_recipe, tmp_path, Silent()).folder
    inodes = [(case_folder(folder, c) / "image.npy").stat().st_ino for c in cases[:2]]
    report = prepare_bank(cases, tiny_recipe, tmp_path, Silent())
    assert (report.made, report.ready) == (("case_2",), ("case_0", "case_1"))
    assert [(case_folder(folder, c) / "image.npy").stat().st_ino for c in cases[:2]] == inodes


@pytest.mark.parametrize("what", ["image time", "label time", "label content", "other file"])
def test_a_changed_case_is_made_again(own_case: Case, tiny_recipe: Recipe, tmp_path: Path, what: str) -> None:
    prepare_bank((own_case,), tiny_recipe, tmp_path, Silent())
    case = own_case
    if what == "other file":
        case = dataclasses.replace(case, image=case.image.rename(case.image.with_name("moved.nii.gz")))
    elif what == "label content":
        labels = read_labels(case.label)
        labels.array[:] = 0
        write_labels(case.label, labels.array, labels.geometry)
    else:
        age(case.image if what == "image time" else case.label)
    assert prepare_bank((case,), tiny_recipe, tmp_path, Silent()).made == ("ct",)
    if what == "label content":
        arrays = open_one(case, tiny_recipe, tmp_path)
        assert len(arrays.foreground) == 0
        assert not arrays.label_XYZ.any()
    assert prepare_bank((case,), tiny_recipe, tmp_path, Silent()).made == ()


def test_each_preprocessing_has_its_own_folder(own_case: Case, tmp_path: Path) -> None:
    base = load_recipe("spleen:small")
    other = [
        load_recipe("spleen:small", ["preprocess.spacing_mm=[4, 4, 5]"]),
        load_recipe("spleen:small", ["preprocess.hu_window=[-57, 165]"]),
        load_recipe("spleen:small", ["preprocess.crop_foreground=false"]),
        load_recipe("spleen:small", ['labels.2="liver"']),
    ]
    folders = {bank_folder(tmp_path, recipe) for recipe in [base, *other]}
    assert len(folders) == 5
    assert bank_folder(tmp_path, load_recipe("spleen:small", ["training.epochs=7"])) in folders
    prepare_bank((own_case,), base, tmp_path, Silent())
    assert prepare_bank((own_case,), other[0], tmp_path, Silent()).made == ("ct",)
    assert prepare_bank((own_case,), base, tmp_path, Silent()).ready == ("ct",)


def test_binarised_labels_are_prepared_as_one(own_case: Case, tiny_recipe: Recipe, changed, tmp_path: Path) -> None:
    recipe = changed(tiny_recipe, preprocess={"binarize_labels": True})
    labels = read_labels(own_case.label)
    prepare_bank((own_case,), recipe, tmp_path, Silent())
    wanted = open_one(own_case, recipe, tmp_path).host_label.copy()
    write_labels(own_case.label, labels.array * 7, labels.geometry)
    prepare_bank((own_case,), recipe, tmp_path, Silent())
    assert np.array_equal(open_one(own_case, recipe, tmp_path).host_label, wanted)
    assert wanted.max() == 1
    assert read_case(own_case)[1].array.max() == 7
    assert read_case(own_case, binarize_labels=True)[1].array.max() == 1


def test_all_bad_cases_are_told_at_once_and_the_good_ones_done(own_case, tiny_recipe, tmp_path: Path, write_ct) -> None:
    def variant(name: str, **changes: Path | None) -> Case:
        return dataclasses.replace(own_case, name=name, **changes)

    labels = read_labels(own_case.label)
    too_high, elsewhere = tmp_path / "high.nii.gz", tmp_path / "elsewhere.nii.gz"
    write_labels(too_high, labels.array * 3, labels.geometry)
    moved = dataclasses.replace(labels.geometry, affine=labels.geometry.affine + np.eye(4)[:, [3, 3, 3, 0]] * 0.8)
    write_labels(elsewhere, labels.array, moved)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(own_case.image.read_bytes()[:-500])
    cases = (
        variant("a_unlabelled", label=None),
        variant("b_high", label=too_high),
        variant("c_elsewhere", label=elsewhere),
        variant("d_broken", image=broken),
        own_case,
    )
    with pytest.raises(ManifestError) as caught:
        prepare_bank(cases, tiny_recipe, tmp_path / "bank", Silent())
    first, *problems = str(caught.value).split("\n  ")
    assert first == "data set: 4 problems"
    assert [p.partition(":")[0] for p in problems] == ["a_unlabelled", "b_high", "c_elsewhere", "d_broken"]
    assert "has no label" in problems[0]
    assert "label value 3, but the recipe has values 1..1" in problems[1]
    assert "does not lie on its image's grid" in problems[2]
    assert str(broken) in problems[3]
    folder = bank_folder(tmp_path / "bank", tiny_recipe)
    assert list(folder.iterdir()) == [case_folder(folder, own_case)]
    assert prepare_bank((own_case,), tiny_recipe, tmp_path / "bank", Silent()).ready == ("ct",)


@pytest.mark.parametrize(("shift_voxels", "accepted"), [(0.04, True), (0.06, False)])
def test_label_grid_may_differ_by_a_twentieth_voxel(own_case, shift_voxels: float, accepted: bool) -> None:
    labels = read_labels(own_case.label)
    affine = labels.geometry.affine.copy()
    affine[0, 3] += shift_voxels * 10.0
    write_labels(own_case.label, labels.array, dataclasses.replace(labels.geometry, affine=affine))
    if accepted:
        assert read_case(own_case)[0].array.shape == (20, 16, 12)
    else:
        with pytest.raises(ImageError, match=r"label 20x16x12 voxels of 10x10x10 mm at .*, image 20x16x12"):
            read_case(own_case)


def test_the_highest_label_of_the_recipe_is_accepted(own_case: Case, tmp_path: Path) -> None:
    labels = read_labels(own_case.label)
    write_labels(own_case.label, labels.array * 2, labels.geometry)
    recipe = load_recipe("spleen:small", ['labels.2="liver"'])
    assert prepare_bank((own_case,), recipe, tmp_path / "bank", Silent()).made == ("ct",)
    assert open_one(own_case, recipe, tmp_path / "bank").label_XYZ.max() == 2


def test_a_ct_that_is_all_air_is_kept_whole(own_case: Case, tiny_recipe: Recipe, tmp_path: Path, write_ct) -> None:
    image = read_image(own_case.image)
    air = np.full(image.array.shape, -1000, np.int16)
    air[0, 0, 0] = -900  # a volume of one value is refused as no CT
    write_ct(own_case.image, Volume(air, image.geometry))
    prepare_bank((own_case,), tiny_recipe, tmp_path, Silent())
    shape = prepare(read_image(own_case.image), tiny_recipe.preprocess, CPU).image_XYZ.shape
    assert open_one(own_case, tiny_recipe, tmp_path).image_XYZ.shape == shape


def _prepare_slowly(case: Case, recipe: Recipe, root: Path) -> None:
    """Prepares a case but waits between the files of a case."""
    save = np.save

    def slow(path: Path, array: np.ndarray) -> None:
        save(path, array)
        (root / "started").touch()
        time.sleep(60)

    np.save = slow
    prepare_bank((case,), recipe, root, Silent())


def test_a_killed_preparation_leaves_no_half_case(own_case: Case, tiny_recipe: Recipe, tmp_path: Path) -> None:
    root = tmp_path / "bank"
    root.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=_prepare_slowly, args=(own_case, tiny_recipe, root))
    process.start()
    deadline = time.monotonic() + 60
    while not (root / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (root / "started").exists()
    folder = bank_folder(root, tiny_recipe)
    assert not case_folder(folder, own_case).exists()
    assert prepare_bank((own_case,), tiny_recipe, root, Silent()).made == ("ct",)
    assert open_one(own_case, tiny_recipe, root).image_XYZ.any()


def test_what_a_killed_process_of_the_same_id_left_does_not_matter(own_case, tiny_recipe, tmp_path: Path) -> None:
    """In a container every run may have the same process id."""
    folder = bank_folder(tmp_path, tiny_recipe)
    left = folder / f".{case_folder(folder, own_case).name}.{os.getpid()}.tmp"
    left.mkdir(parents=True)
    (left / "image.npy").write_bytes(b"half")
    assert prepare_bank((own_case,), tiny_recipe, tmp_path, Silent()).made == ("ct",)
    assert set(folder.iterdir()) == {left, case_folder(folder, own_case)}  # it goes after a day


def test_a_case_that_another_run_makes_in_the_last_moment_is_accepted(
    own_case, tiny_recipe, tmp_path, monkeypatch
) -> None:
    """After it was looked for, and before this run's own takes its place."""
    folder = case_folder(bank_folder(tmp_path, tiny_recipe), own_case)
    is_ready, asked = bank._is_ready, []

    def overtaken(*args) -> bool:
        asked.append(args)
        if len(asked) == 2:  # the first time is that of the list of what is to be done
            monkeypatch.setattr(bank.shutil, "rmtree", lambda *_args, **_options: None)
            prepare_bank((own_case,), tiny_recipe, tmp_path, Silent())
            monkeypatch.undo()
            monkeypatch.setattr(bank.shutil, "rmtree", lambda *_args, **_options: None)
            return False
        return bool(is_ready(*args))

    monkeypatch.setattr(bank, "_is_ready", overtaken)
    assert prepare_bank((own_case,), tiny_recipe, tmp_path, Silent()).made == ("ct",)
    assert (folder / "case.json").is_file()


def test_processes_of_one_number_on_two_nodes_do_not_take_each_others_files(
    own_case, tiny_recipe, tmp_path, monkeypatch
) -> None:
    """Both write the same case, the second one while the first one is at it."""
    save = np.save

    def interrupted(*args):
        monkeypatch.setattr(bank.np, "save", save)
        folder = bank_folder(tmp_path, tiny_recipe)
        bank._prepare_case(case_folder(folder, own_case), own_case, tiny_recipe)
        save(*args)

    monkeypatch.setattr(bank.np, "save", interrupted)
    assert prepare_bank((own_case,), tiny_recipe, tmp_path, Silent()).made == ("ct",)
    folder = bank_folder(tmp_path, tiny_recipe)
    assert list(folder.iterdir()) == [case_folder(folder, own_case)]
    assert open_one(own_case, tiny_recipe, tmp_path).image_XYZ.any()


def test_a_case_made_by_another_process_meanwhile_is_accepted(own_case, tiny_recipe, tmp_path, monkeypatch) -> None:
    """Two trainings that start together prepare the same cases; the second one to finish must not fail."""
    prepare_alone = bank.prepare

    def overtaken(*args):
        monkeypatch.setattr(bank, "prepare", prepare_alone)
        prepare_bank((own_case,), tiny_recipe, tmp_path, Silent())
        inode.append(case_folder(bank_folder(tmp_path, tiny_recipe), own_case).stat().st_ino)
        return prepare_alone(*args)

    inode: list[int] = []
    monkeypatch.setattr(bank, "prepare", overtaken)
    folder = prepare_bank((own_case,), tiny_recipe, tmp_path, Silent()).folder
    assert case_folder(folder, own_case).stat().st_ino == inode[0]  # whoever has opened it keeps it
    assert list(folder.iterdir()) == [case_folder(folder, own_case)]


@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_a_damaged_prepared_case_is_told_with_its_remedy(own_case, tiny_recipe, tmp_path: Path, damage: str) -> None:
    folder = case_folder(prepare_bank((own_case,), tiny_recipe, tmp_path, Silent()).folder, own_case)
    image = folder / "image.npy"
    if damage == "missing":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[: -100 if damage == "cut" else 0])
    with pytest.raises(CtsegError, match=rf"prepared case '{folder}': cannot be read .*; delete it and prepare again"):
        open_one(own_case, tiny_recipe, tmp_path)


def test_a_case_with_a_spoiled_description_is_made_again(own_case, tiny_recipe, tmp_path: Path) -> None:
    folder = case_folder(prepare_bank((own_case,), tiny_recipe, tmp_path, Silent()).folder, own_case)
    for text in ("", "{", "{}", json.dumps({"source": []})):
        (folder / "case.json").write_text(text)
        assert prepare_bank((own_case,), tiny_recipe, tmp_path, Silent()).made == ("ct",)


def test_cases_take_a_share_of_a_gpu_together(monkeypatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 4000))
    room = Room.on(gpu)
    assert [room.take(n) for n in (300, 300, 200, 1)] == [True, False, True, False]
    assert Room.on(gpu, max_bytes=200).num_bytes == 100
    assert Room.on(gpu, max_bytes=2000).num_bytes == 500
    assert Room.on(CPU).num_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cases_that_fit_lie_on_the_gpu_others_do_not(own_case, tiny_recipe, tmp_path, monkeypatch) -> None:
    folder = prepare_bank((own_case,), tiny_recipe, tmp_path, Silent()).folder
    device = torch.device("cuda", 0)
    (inside,) = open_bank((own_case,), folder, device)
    assert inside.image_XYZ.device == device
    assert torch.equal(inside.image_XYZ.cpu(), open_one(own_case, tiny_recipe, tmp_path).image_XYZ)
    monkeypatch.setattr(bank, "GPU_SHARE", 0.0)
    (outside,) = open_bank((own_case,), folder, device)
    assert outside.image_XYZ.device == CPU


def test_cases_of_one_name_from_different_files_do_not_meet(
    own_case: Case, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    other = tmp_path / "expert_b.nii.gz"
    labels = read_labels(own_case.label)
    write_labels(other, np.asfortranarray(labels.array[::-1]), labels.geometry)
    second = dataclasses.replace(own_case, label=other)
    prepare_bank((own_case,), tiny_recipe, tmp_path / "bank", Silent())
    first_labels = open_one(own_case, tiny_recipe, tmp_path / "bank").host_label.copy()
    report = prepare_bank((second,), tiny_recipe, tmp_path / "bank", Silent())
    assert report.made == ("ct",)
    assert np.array_equal(open_one(own_case, tiny_recipe, tmp_path / "bank").host_label, first_labels)
    assert not np.array_equal(open_one(second, tiny_recipe, tmp_path / "bank").host_label, first_labels)


def test_a_stop_between_two_cases_loses_nothing(tiny_manifest: Manifest, tiny_recipe: Recipe, tmp_path: Path) -> None:
    asked = []
    cases = tiny_manifest.split("training")
    with pytest.raises(Stopped, match="1 cases are ready"):
        prepare_bank(cases, tiny_recipe, tmp_path, Silent(), lambda: len(asked) == 1 or bool(asked.append(1)))
    report = prepare_bank(cases, tiny_recipe, tmp_path, Silent())
    assert (report.ready, report.made) == (("case_0",), ("case_1", "case_2"))


@pytest.mark.parametrize("workers", [2, 4])
def test_several_at_once_give_the_same_bits_as_one(tiny_manifest, tiny_recipe: Recipe, tmp_path: Path, workers: int):
    cases = tiny_manifest.to_prepare
    threads = torch.get_num_threads()
    alone = prepare_bank(cases, tiny_recipe, tmp_path / "alone", Silent(), workers=1)
    together = prepare_bank(cases, tiny_recipe, tmp_path / "together", Silent(), workers=workers)
    assert together.made == alone.made == tuple(case.name for case in cases)
    assert bank_fingerprint(cases, together.folder) == bank_fingerprint(cases, alone.folder)
    for name in ("image", "label", "foreground"):
        files = [case_folder(r.folder, case) / f"{name}.npy" for case in cases for r in (alone, together)]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files[::2], files[1::2], strict=True))
    assert torch.get_num_threads() == threads


def test_a_bad_case_does_not_keep_others_that_run_beside_it_from_being_done(
    own_case, tiny_recipe, tmp_path: Path
) -> None:
    others = []
    for n in range(3):
        image = tmp_path / f"other_{n}.nii.gz"
        image.write_bytes(own_case.image.read_bytes())
        others.append(dataclasses.replace(own_case, name=f"other_{n}", image=image))
    bad = [dataclasses.replace(own_case, name=name, label=None) for name in ("z", "a")]
    cases = (bad[0], *others, bad[1])
    with pytest.raises(ManifestError) as caught:
        prepare_bank(cases, tiny_recipe, tmp_path / "bank", Silent(), workers=4)
    assert [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]] == ["z", "a"], "in order"
    assert prepare_bank(tuple(others), tiny_recipe, tmp_path / "bank", Silent()).made == ()


@pytest.mark.parametrize("letter", ["x", "ü", "骨"])
def test_the_longest_names_of_files_can_be_prepared(own_case, tiny_recipe: Recipe, tmp_path: Path, letter: str) -> None:
    name = letter * ((255 - len(".nii.gz")) // len(letter.encode()))
    case = dataclasses.replace(own_case, name=name, image=own_case.image.rename(tmp_path / f"{name}.nii.gz"))
    assert prepare_bank((case,), tiny_recipe, tmp_path / "bank", Silent()).made == (name,)
    assert open_one(case, tiny_recipe, tmp_path / "bank").name == name
