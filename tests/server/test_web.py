"""The annotation page in a real browser: what is seen is what is clicked, and what is saved."""

import gzip
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.ndimage import center_of_mass, label

from ctseg.errors import DownloadError
from ctseg.io.images import read_labels
from ctseg.server import viewer

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: pip install it")

SOFTWARE_GL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
GRIDS = {
    "lps": ("LPS", (44, 36, 28), (2.0, 2.5, 4.0)),
    "air": ("AIR", (38, 30, 42), (2.5, 3.5, 2.0)),
}
"""Axis codes, size and spacing in mm of the CTs, by image id: every axis both ways, and axes in another order."""
MARKER_OFFSETS = (-6, 7, 5)
"""Of the marker from the middle, in voxels along the file's own axes."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a screen, which draws WebGL on the CPU."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    try:
        viewer.bring_viewer()
    except DownloadError as error:
        pytest.skip(f"no viewer library: {error}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *SOFTWARE_GL, *QUIET])
        yield browser
        browser.close()


def marker_of(size: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(n // 2 + offset for n, offset in zip(size, MARKER_OFFSETS, strict=True))


def write_marked_ct(path: Path, codes: str, size: tuple[int, int, int], spacing_mm: tuple[float, ...]) -> None:
    """Soft tissue with one bright voxel, its axes 12 degrees off those of the patient."""
    array = np.full(size, 20, dtype=np.int16)
    array[marker_of(size)] = 1000
    axes = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    cosine, sine = np.cos(np.radians(12)), np.sin(np.radians(12))
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([axes[code] for code in codes]).T * spacing_mm
    affine[:3, 3] = (-31, 17, 240)
    nibabel.Nifti1Image(array, affine).to_filename(path)


class Page:
    """The page of one server, as someone in front of it sees and uses it."""

    def __init__(self, browser: Any, live: Any) -> None:
        self.live = live
        self.allowed = ""
        self.context = browser.new_context(viewport={"width": 960, "height": 600})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[Any] = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("dialog", lambda dialog: dialog.accept())  # "not saved, go on?"
        self.page.goto(live.url)

    def wait(self) -> None:
        self.page.locator("#busy").wait_for(state="hidden")

    def open(self, image: str) -> None:
        self.page.locator(f"#image option[value='{image}']").wait_for(state="attached")
        self.page.select_option("#image", image)
        self.page.locator(f"#canvas[data-image='{image}']").wait_for()
        self.wait()

    def pixels(self) -> np.ndarray:
        """What is on the canvas, with marks over it: `[row, column, RGB]`, 0 to 1."""
        return imread(io.BytesIO(self.page.locator("#canvas").screenshot()))[..., :3]

    def bright_places(self) -> list[tuple[float, float]]:
        """Where the marker is seen on the page: its brightest points, x and y, from left to right."""
        pixels = self.pixels()
        spots, count = label(pixels.min(axis=2) > 0.6)
        box = self.page.locator("#canvas").bounding_box()
        found = center_of_mass(np.ones(spots.shape), spots, range(1, count + 1))
        return sorted((box["x"] + column + 0.5, box["y"] + row + 0.5) for row, column in found)

    def red_pixels(self) -> int:
        red, green, blue = np.moveaxis(self.pixels(), 2, 0)
        return int(((red > green + 0.1) & (red > blue + 0.1)).sum())

    def clicks(self) -> list[tuple[tuple[int, ...], bool]]:
        """What the server knows of, which is what the page lists."""
        (entry,) = self.live.service.click_sessions._entries.values()
        clicks = [(tuple(one.point), one.positive) for one in entry.content.clicks]
        listed = self.page.locator("#clicks li").all_text_contents()
        assert listed == [f"{'+' if positive else '−'}{', '.join(map(str, point))}" for point, positive in clicks]
        return clicks

    @contextmanager
    def holding(self, path: str) -> Iterator[None]:
        """Keeps requests of `path` on their way, one at least, until the end."""
        held: list[Any] = []
        self.page.route(f"**{path}", lambda route: held.append(route))
        yield
        for _ in range(100):
            if held:
                break
            self.page.wait_for_timeout(50)
        assert held
        for route in held:
            route.continue_()
        self.page.unroute(f"**{path}")
        self.wait()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.locator("#canvas").press(key)

    def error(self) -> str:
        self.page.locator("#error").wait_for(state="visible")
        return self.page.locator("#error span").inner_text()


@pytest.fixture
def marked(studies: Path) -> Path:
    """The studies folder, with CTs that have one bright voxel."""
    for name, grid in GRIDS.items():
        write_marked_ct(studies / f"{name}.nii.gz", *grid)
    return studies


@pytest.fixture
def opened(browser: Any, start: Callable[..., Any]) -> Iterator[Callable[..., Page]]:
    """A function that starts a server and opens its page; in the end nothing was complained of, or asked elsewhere."""
    pages: list[Page] = []

    def show(allowed: str = "", **settings: Any) -> Page:
        page = Page(browser, start(**settings))
        page.allowed = allowed
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.context.close()
        elsewhere = [r.url for r in page.requests if not r.url.startswith((page.live.url, "data:", "blob:"))]
        assert not elsewhere
        assert [text for text in page.complaints if not page.allowed or page.allowed not in text] == []


def find_marker(page: Page, codes: str) -> None:
    """Turns the wheel over the axial plane until it shows the marker."""
    axis = next(n for n, code in enumerate(codes) if code in "SI")
    steps = MARKER_OFFSETS[axis] * (1 if codes[axis] == "S" else -1)
    if codes[axis] == "I" and GRIDS[codes.lower()][1][axis] % 2 == 0:
        steps -= 1  # the middle of an even number of slices is another one when counted from the other end
    box = page.page.locator("#canvas").bounding_box()
    page.page.mouse.move(box["x"] + 200, box["y"] + box["height"] / 2)
    for _ in range(abs(steps)):
        page.page.mouse.wheel(0, -100 * int(np.sign(steps)))
    page.page.wait_for_timeout(100)


def test_a_click_in_any_plane_is_the_voxel_under_the_mouse(opened: Callable[..., Page], marked: Path) -> None:
    page = opened()
    for name, (codes, size, _) in GRIDS.items():
        page.open(name)
        assert page.bright_places() == []
        find_marker(page, codes)
        (place,) = page.bright_places()  # in the axial plane alone
        page.page.mouse.click(*place)
        page.wait()
        assert page.clicks() == [(marker_of(size), True)], name
        assert f"Voxel {', '.join(map(str, marker_of(size)))} · 1000 HU" in page.page.locator("#location").inner_text()
        page.page.click("#undo")
        page.wait()
        page.page.keyboard.press("+")
        page.page.wait_for_timeout(100)
        places = page.bright_places()  # the crosshair is at the marker now: all three planes show it, larger
        assert len(places) == 3, name
        for place in places:
            page.page.mouse.click(*place)
            page.wait()
        assert page.clicks() == [(marker_of(size), True)] * 3, name


def test_clicks_undo_and_saving(opened: Callable[..., Page], marked: Path) -> None:
    page = opened()
    page.open("air")
    assert page.pixels().std() > 0.05  # not blank
    assert page.red_pixels() == 0
    box = page.page.locator("#canvas").bounding_box()
    x, y = box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.45
    page.page.mouse.click(x, y)
    page.wait()
    alone = page.red_pixels()
    assert alone > 100
    page.page.mouse.click(x + 40, y, button="right")
    page.wait()
    assert [positive for _, positive in page.clicks()] == [True, False]
    page.page.keyboard.down("Shift")
    page.page.mouse.click(x - 40, y)
    page.page.keyboard.up("Shift")
    page.wait()
    assert [positive for _, positive in page.clicks()] == [True, False, False]
    page.page.keyboard.press("Control+z")
    page.page.click("#undo")
    page.wait()
    assert [positive for _, positive in page.clicks()] == [True]
    (session,) = page.live.service.click_sessions._entries.values()
    mask = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(session.content.mask)).dataobj)
    page.page.fill("#label", "left kidney")
    page.page.click("#save")
    page.page.locator("#status", has_text="Saved “left kidney”").wait_for()
    saved = read_labels(marked / "labels" / "final" / "air.nii.gz")
    assert mask.any()
    assert np.array_equal(saved.array > 0, mask > 0)
    page.wait()
    assert page.page.locator("#image option:checked").inner_text() == "air ✓"
    page.page.click("#reset")
    page.wait()
    assert page.red_pixels() == 0
    assert page.clicks() == []


def test_clicks_made_while_others_are_taken_back_stay(opened: Callable[..., Page], marked: Path) -> None:
    page = opened()
    page.open("air")
    page.press("Enter", "ArrowUp", "Enter")
    page.wait()
    first, second = page.clicks()
    with page.holding("/undo"):
        page.press("Control+z", "ArrowUp", "Shift+Enter")
    after_undo = page.clicks()
    assert after_undo[0] == first
    assert len(after_undo) == 2
    assert after_undo[1] != second
    with page.holding("/undo"):
        page.press("Control+z", "Control+z", "Enter")
    assert page.clicks() == [(after_undo[1][0], True)]
    with page.holding("/reset"):
        page.press("Delete", "ArrowDown", "Enter")
    assert page.clicks() == [second]
    assert page.red_pixels() > 0
    assert page.page.locator("#save").is_enabled()


def test_what_was_left_does_not_reach_what_was_chosen_then(
    opened: Callable[..., Page], marked: Path, made: SimpleNamespace
) -> None:
    models = [("deepgrow", made.clicks_model()), ("other", made.clicks_model())]
    page = opened(allowed="Failed to load resource", models=models)
    page.open("lps")

    def session() -> tuple[str, str]:
        assert len(page.clicks()) == 1
        (entry,) = page.live.service.click_sessions._entries.values()
        return entry.content.id, entry.content.model

    with page.page.expect_response(lambda response: response.request.method == "DELETE"):
        with page.holding("/api/sessions"):
            page.press("Enter")
            page.page.select_option("#image", "air")
            page.press("Enter")  # the picture is still that of the other image
        assert page.page.locator("#clicks li").count() == 0
        assert page.page.locator("#save").is_disabled()
    page.press("Enter")
    page.wait()
    assert session() == ("air", "deepgrow")
    page.page.click("#reset")
    page.wait()
    with page.holding("/clicks"):  # that session is gone when this click comes to the server
        page.press("Enter")
        page.page.select_option("#model", "other")
        page.press("Enter")
    assert session() == ("air", "other")
    assert page.page.locator("#error").is_hidden()


def test_what_goes_wrong_is_told_in_words(opened: Callable[..., Page], marked: Path, tmp_path: Path) -> None:
    page = opened(allowed="Failed to load resource")  # the browser's own words on each 4xx
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"not an image")
    page.page.locator("#image option[value='lps']").wait_for(state="attached")
    page.page.set_input_files("#upload", broken)
    assert "must be gzip data" in page.error()
    page.page.click("#error button")
    write_marked_ct(tmp_path / "new.nii.gz", *GRIDS["air"])
    page.page.set_input_files("#upload", tmp_path / "new.nii.gz")
    page.page.locator("#canvas[data-image='new']").wait_for()
    assert (marked / "new.nii.gz").read_bytes() == (tmp_path / "new.nii.gz").read_bytes()
    page.page.locator("#canvas").press("Enter")
    page.wait()
    assert len(page.clicks()) == 1
    page.live.service.click_sessions.clear()
    page.page.locator("#canvas").press("Enter")
    assert "session" in page.error()
    assert page.page.locator("#clicks li").count() == 0
    page.page.locator("#canvas").press("Enter")  # begins another one
    page.wait()
    assert len(page.clicks()) == 1


def test_a_token_is_asked_for_and_kept_in_the_tab_only(opened: Callable[..., Page], marked: Path) -> None:
    page = opened(allowed="status of 401", token="a-long-secret-token")
    tokens = {
        "not-the-right-one": "asks for a token",
        "a-long-s\u20acret-token": "not the right one",
        "a-long-secret-token": "ASCII",
    }
    for token, title in tokens.items():
        page.page.locator("#token-dialog[open] #token-title", has_text=title).wait_for()
        page.page.fill("#token", token)
        page.page.keyboard.press("Enter")
    page.open("lps")
    stored = "() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
    assert page.page.evaluate(stored) == [["a-long-secret-token"], [], ""]


def test_a_model_without_clicks_segments_and_its_labels_are_saved(opened: Callable[..., Page], marked: Path) -> None:
    page = opened()
    page.open("one")
    page.page.select_option("#model", "spleen")
    page.page.click("#segment")
    page.wait()
    assert page.red_pixels() > 100
    page.page.click("#save")
    page.page.locator("#status", has_text="Saved").wait_for()
    (put,) = [request.url for request in page.requests if request.method == "PUT"]
    assert put == f"{page.live.url}/api/images/one/labels/final?model=spleen"
    assert read_labels(marked / "labels" / "final" / "one.nii.gz").array.any()


def test_without_its_viewer_the_page_says_how_to_get_it(opened: Callable[..., Page], browser: Any) -> None:
    page = opened(allowed="status of 404")
    page.page.route("**/vendor/*", lambda route: route.fulfill(status=404))
    page.page.reload()
    page.page.locator("#missing").wait_for(state="visible")
    assert "python -m ctseg.server.viewer" in page.page.locator("#missing").inner_text()
