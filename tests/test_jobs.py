"""Which CTs an `infer` is asked for, and that no two of them share a mask."""

import json
from pathlib import Path

import pytest

from ctseg.errors import CtsegError
from ctseg.jobs import Job, Shard, choose_shard, find_jobs


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*names: str) -> list[Path]:
    paths = [Path(name) for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def masks(inputs: list[Path], output: str = "out") -> dict[str, str]:
    """The image of each job -> its mask below the output folder."""
    jobs = find_jobs(inputs, Path(output))
    found = {str(job.image): str(job.mask.relative_to(output)) for job in jobs}
    assert len(found) == len(jobs)
    assert len(set(found.values())) == len(jobs)
    return found


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a/ct.nii.gz", "ct_seg.nii.gz"),
        ("ct.nii", "ct_seg.nii"),
        ("ct.v2.nrrd", "ct.v2_seg.nrrd"),
        ("ct.MHA", "ct_seg.MHA"),
        ("scan.dcm", "scan.dcm_seg.nii.gz"),
    ],
)
def test_name_of_a_mask(here: Path, image: str, mask: str) -> None:
    assert masks(made(image)) == {image: mask}


def test_folders_are_searched_and_keep_their_subfolders(here: Path) -> None:
    made("in/b.nii.gz", "in/s1/ct.nii.gz", "in/s2/ct.nii.gz", "in/notes.txt", "in/.hidden.nii.gz", "in/x.png")
    assert masks([Path("in")]) == {
        "in/b.nii.gz": "b_seg.nii.gz",
        "in/s1/ct.nii.gz": "s1/ct_seg.nii.gz",
        "in/s2/ct.nii.gz": "s2/ct_seg.nii.gz",
    }


def test_files_of_one_name_keep_what_tells_them_apart(here: Path) -> None:
    files = made("p/one/ct.nii.gz", "p/two/ct.nii.gz", "p/two/other.nii.gz")
    assert masks(files) == {
        "p/one/ct.nii.gz": "one/ct_seg.nii.gz",
        "p/two/ct.nii.gz": "two/ct_seg.nii.gz",
        "p/two/other.nii.gz": "other_seg.nii.gz",
    }


def test_folders_with_equal_contents_are_told_apart(here: Path) -> None:
    made("a/s/ct.nii.gz", "b/s/ct.nii.gz")
    assert masks([Path("a"), Path("b")]) == {
        "a/s/ct.nii.gz": "a/s/ct_seg.nii.gz",
        "b/s/ct.nii.gz": "b/s/ct_seg.nii.gz",
    }


def test_equal_names_of_other_formats_do_not_collide(here: Path) -> None:
    files = made("ct.nii.gz", "ct.nii", "ct.nrrd", "ct.mha", "ct.dcm")
    assert len(masks(files)) == 5


@pytest.mark.parametrize("turn", [1, -1])
def test_a_file_named_twice_is_done_once(here: Path, turn: int) -> None:
    """By its path, by its folder, by an absolute and by a winding path; others must still be told apart from it."""
    (first, second) = made("in/s/ct.nii.gz", "other/ct.nii.gz")
    inputs = [Path("in"), first, first.absolute(), Path("in/../in/s/ct.nii.gz"), second][::turn]
    jobs = find_jobs(inputs, Path("out"))
    assert {job.image.resolve() for job in jobs} == {first.resolve(), second.resolve()}
    assert len(jobs) == len({job.mask for job in jobs}) == 2


def test_lists_and_manifests_name_files_beside_them(here: Path) -> None:
    made("data/a.nii.gz", "data/b/ct.nii.gz", "data/c/ct.nii.gz")
    Path("data/list.txt").write_text("a.nii.gz\n\nb/ct.nii.gz\nc/ct.nii.gz\n")
    expected = {
        "data/a.nii.gz": "a_seg.nii.gz",
        "data/b/ct.nii.gz": "b/ct_seg.nii.gz",
        "data/c/ct.nii.gz": "c/ct_seg.nii.gz",
    }
    assert masks([Path("data/list.txt")]) == expected
    entries = {"training": [{"image": "a.nii.gz", "label": "x.nii.gz"}], "test": ["b/ct.nii.gz", "c/ct.nii.gz"]}
    Path("data/list.json").write_text(json.dumps(entries))
    assert masks([Path("data/list.json")]) == expected
    Path("data/LIST.CSV").write_text(
        "image,label,split\na.nii.gz,x.nii.gz,training\nb/ct.nii.gz,,\nc/ct.nii.gz,,test\n"
    )
    assert masks([Path("data/LIST.CSV")]) == expected


def test_masks_of_an_earlier_run_inside_the_input_are_not_cts(here: Path) -> None:
    made("in/ct.nii.gz", "in/out/ct_seg.nii.gz", "in/outside/ct2.nii.gz")
    assert masks([Path("in")], "in/out") == {
        "in/ct.nii.gz": "ct_seg.nii.gz",
        "in/outside/ct2.nii.gz": "outside/ct2_seg.nii.gz",
    }


@pytest.mark.parametrize("output", ["in", ".", "in/../in", "link"])
def test_masks_may_not_lie_among_the_cts(here: Path, output: str) -> None:
    made("in/ct.nii.gz")
    Path("link").symlink_to("in")
    with pytest.raises(CtsegError, match="choose another --output"):
        find_jobs([Path("in")], Path(output))


def test_a_mask_never_replaces_an_input(here: Path) -> None:
    files = made("ct.nii.gz", "ct_seg.nii.gz")
    with pytest.raises(CtsegError, match=r"'ct_seg.nii.gz' is an input and would be the mask of 'ct.nii.gz'"):
        find_jobs(files, Path())
    assert len(masks(files)) == 2


def test_what_is_not_there_is_told(here: Path) -> None:
    made("in/notes.txt")
    with pytest.raises(CtsegError, match=r"input 'none.nii.gz': no such file or folder"):
        find_jobs([Path("none.nii.gz")], Path("out"))
    with pytest.raises(CtsegError, match=r"no CT in in; known: DICOM and .nii.gz, .nii, .nrrd, .mha"):
        find_jobs([Path("in")], Path("out"))


JOBS = [Job(Path(f"{n}.nii"), Path(f"{n}_seg.nii")) for n in range(11)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11, 12, 20])
def test_each_ct_is_in_exactly_one_shard(count: int) -> None:
    shards = [choose_shard(f"{number}/{count}", {}) for number in range(1, count + 1)]
    taken = [job for shard in shards for job in shard.take(JOBS)]
    assert sorted(taken, key=JOBS.index) == JOBS
    sizes = [len(shard.take(JOBS)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert len({shard.failures for shard in shards}) == count
    assert [str(shard) for shard in shards] == [f"{n}/{count}" for n in range(1, count + 1)]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "", "1/2/3", "1/" + "9" * 5000])
def test_a_wrong_shard_is_refused(text: str) -> None:
    with pytest.raises(CtsegError, match=f"--shard {text}: expected auto or I/N"):
        choose_shard(text, {})


def test_all_of_it_without_a_word() -> None:
    assert choose_shard(None, {}) == Shard()
    assert Shard().failures == "failures.csv"


def array(task: int) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in {"ID": task, "MIN": 1, "MAX": 3, "COUNT": 3}.items()}


def task(index: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(index), "SLURM_STEP_NUM_TASKS": "2"}


def test_an_array_task_takes_its_part_if_it_is_told_to() -> None:
    """Not by itself: many arrays name another file in each task, and all of it is meant."""
    assert choose_shard("auto", array(2)) == Shard(1, 3)
    assert choose_shard(None, array(2)) == Shard()
    assert choose_shard("auto", {}) == Shard()


def test_processes_started_together_divide_a_part() -> None:
    parts = [choose_shard(f"{number}/3", task(index)) for number in (1, 2, 3) for index in (0, 1)]
    assert sorted((job for part in parts for job in part.take(JOBS)), key=JOBS.index) == JOBS
    assert len(set(parts)) == 6
    assert {choose_shard("auto", {**array(n), **task(i)}) for n in (1, 2, 3) for i in (0, 1)} == set(parts)
    assert choose_shard("1/1", {"RANK": "1", "WORLD_SIZE": "4"}) == Shard(1, 4)


def test_processes_started_together_do_not_do_the_same() -> None:
    with pytest.raises(CtsegError, match="started as 2 processes, which would all do the same CTs; add --shard 1/1"):
        choose_shard(None, task(0))
