"""The headline: from the same file and the same weights, the mask that MONAI's own chain gives."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers.inferer import SlidingWindowInferer
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from ctseg.engine.model import Model, forward_of
from ctseg.engine.predict import predict
from ctseg.engine.runtime import Runtime
from ctseg.io.images import read_image
from ctseg.networks import network_for
from ctseg.recipe import Recipe, load_recipe
from ctseg.sources.phantom import centered_grid, make_phantom
from ctseg.specs import Inference
from ctseg.volume import Geometry, Volume

# MONAI warns of a DICOM reader that is not installed here.
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")
CPU = Runtime(torch.device("cpu"))
TIE = 1e-3
"""Voxels may differ where MONAI's probabilities differ by less: rounding decides there."""


class Sharpened(nn.Module):
    """A network with fresh weights whose second logit is moved and stretched, so that it finds something.

    Fresh weights give logits that hardly differ, so nearly every voxel would be a tie.
    """

    def __init__(self, network: nn.Module, shift: float, stretch: float) -> None:
        super().__init__()
        self.network, self.shift, self.stretch = network, shift, stretch

    def forward(self, image_BCXYZ: Tensor) -> Tensor:
        logits_BCXYZ = self.network(image_BCXYZ)
        foreground = logits_BCXYZ[:, 1:] - logits_BCXYZ[:, :1] - self.shift
        return torch.cat([-foreground, foreground], dim=1) * self.stretch


@pytest.fixture(scope="module")
def spleen_network() -> nn.Module:
    """The spleen recipe's 4.8 million parameters; finds 30 % of a made CT's middle."""
    torch.manual_seed(0)
    network = network_for(load_recipe("spleen")).eval()
    grid = centered_grid((96, 96, 96), (3.0, 3.0, 3.0), "RAS")
    image = torch.from_numpy(make_phantom(0, 0, grid=grid).image.array.astype(np.float32))
    with torch.inference_mode():
        logits = network(((image + 57) / 221).clamp(0, 1)[None, None])[0]
    difference = logits[1] - logits[0]
    shift = float(np.quantile(difference.numpy(), 0.7))
    return Sharpened(network, shift, 4.0 / float(difference.std())).eval()


def monai_mask(path: Path, recipe: Recipe, network: nn.Module) -> tuple[NDArray[np.int64], Tensor]:
    """MONAI's mask on the file's own grid, and its probabilities there."""
    low, high = recipe.preprocess.hu_window
    chain = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            # `labels` is the default, which MONAI warns about unless it is given.
            Orientationd("image", "RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacingd("image", recipe.preprocess.spacing_mm, mode="bilinear"),
            ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
        ]
    )
    data = chain({"image": str(path)})
    inferer = SlidingWindowInferer(recipe.inference.window_size, sw_batch_size=1, overlap=recipe.inference.overlap)
    with torch.inference_mode():
        logits = inferer(data["image"].as_tensor()[None], network)[0]
    data["scores"] = MetaTensor(torch.softmax(logits, dim=0))
    scores = Invertd("scores", chain, "image", nearest_interp=False)(data)["scores"].as_tensor()
    return scores.argmax(0).numpy(), scores


@dataclass(frozen=True)
class Comparison:
    """What two masks of one volume have in common."""

    foreground: float
    dice: float
    differing: int
    widest_tie: float

    def __str__(self) -> str:
        return f"{self.foreground:.1%} foreground, Dice {self.dice:.6f}, {self.differing} voxels differ"


@pytest.fixture
def compare(spleen_network: nn.Module) -> Callable[[Path, Inference], Comparison]:
    def run(path: Path, inference: Inference) -> Comparison:
        recipe = replace(load_recipe("spleen"), inference=inference)
        model = Model(recipe, forward_of(spleen_network, CPU), CPU, Path("model.pt"), "")
        start = time.perf_counter()
        ours = predict(model, read_image(path))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        monai, scores = monai_mask(path, recipe, spleen_network)
        seconds_monai = time.perf_counter() - start
        differs = torch.from_numpy(ours != monai)
        gaps = (scores[1] - scores[0]).abs()[differs]
        dice = 2 * np.count_nonzero(ours & (monai == 1)) / (np.count_nonzero(ours) + np.count_nonzero(monai))
        widest = float(gaps.max()) if len(gaps) else 0.0
        result = Comparison(float(ours.mean()), dice, int(differs.sum()), widest)
        print(f"{path.name}: {result}, widest tie {widest:.1e}; {seconds:.1f} s, MONAI {seconds_monai:.1f} s")
        return result

    return run


def assert_same(result: Comparison) -> None:
    assert 0.05 < result.foreground < 0.8
    assert result.dice >= 0.999
    assert result.widest_tie < TIE


CARD = load_recipe("spleen").inference
SMALL = replace(CARD, window_size=(96, 96, 96), overlap=0.0)


@pytest.mark.parametrize(
    ("name", "inference"),
    [
        pytest.param("totalsegmentator_example/example_ct_sm.nii.gz", CARD, id="part_of_example"),
        pytest.param("msd_spleen8/imagesTr/spleen_8.nii.gz", SMALL, id="spleen_8_small_windows"),
        pytest.param("crlm_abdomen/CRLM-CT-1006_ct.nii.gz", SMALL, id="crlm_1006_small_windows"),
        pytest.param("totalsegmentator_example/example_ct.nii.gz", CARD, id="example", marks=pytest.mark.slow),
        pytest.param("msd_spleen8/imagesTr/spleen_8.nii.gz", CARD, id="spleen_8", marks=pytest.mark.slow),
        pytest.param("crlm_abdomen/CRLM-CT-1004_ct.nii.gz", CARD, id="crlm_1004", marks=pytest.mark.slow),
        pytest.param("lidc_chest/LIDC-IDRI-0001_ct.nii.gz", CARD, id="lidc_0001", marks=pytest.mark.slow),
    ],
)
def test_real_volumes_get_monais_mask(
    real_data: Path, compare: Callable[[Path, Inference], Comparison], name: str, inference: Inference
) -> None:
    assert_same(compare(real_data / name, inference))


def test_an_oblique_file_gets_monais_mask(
    tmp_path: Path, write_ct: Callable[[Path, Volume], None], compare: Callable[[Path, Inference], Comparison]
) -> None:
    """Turned by 20 degrees and stored as NIfTI: MONAI aligns the grids' middles there."""
    grid = centered_grid((61, 70, 33), (3.1, 2.9, 6.2), "PIR")
    turn = Rotation.from_euler("xyz", (20, -12, 7), degrees=True).as_matrix()
    turned = Geometry.from_parts(grid.size, grid.spacing_mm, grid.origin_mm, turn @ grid.direction)
    path = tmp_path / "oblique.nii.gz"
    write_ct(path, Volume(make_phantom(3, 0, grid=grid).image.array, turned))
    assert_same(compare(path, replace(CARD, window_size=(64, 64, 64), overlap=0.0)))
