"""The parts of a recipe, one frozen dataclass for each table of its TOML file.

A table with a `kind` is one of several classes. A field with a default may be missing from the file; its default is
always "off". Order of spatial numbers is x, y, z.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from ctseg.strict import Range

Positive = Annotated[float, Range(above=0)]
Millimetres = Annotated[float, Range(above=0, at_most=1000)]
Probability = Annotated[float, Range(at_least=0, at_most=1)]
Count = Annotated[int, Range(at_least=1, at_most=100_000)]
Channels = Annotated[int, Range(at_least=1, at_most=4096)]
Length = Annotated[int, Range(at_least=1, at_most=1024)]
Size = tuple[Length, Length, Length]
MAX_LEVELS = 16
"""Of a network; the largest patch can be halved ten times."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which data set trains the recipe."""

    manifest: str
    """Name of a manifest that ships with ctseg, or of a made data set."""


@dataclass(frozen=True, kw_only=True)
class CodeSpec:
    """What a structure is, for DICOM outputs: a code of SNOMED CT and its meaning for each question."""

    category: tuple[str, str]
    """E.g. ["91723000", "Anatomical Structure"]."""
    type: tuple[str, str]
    region: tuple[str, str] | None = None
    """Where it is, if its type does not say."""

    def check(self) -> Iterator[str]:
        """Problems beyond those of single values, as "key: text"."""
        for key, code in (("category", self.category), ("type", self.type), ("region", self.region)):
            if code is not None and not (code[0].isdecimal() and 0 < len(code[0]) <= 16 and 0 < len(code[1]) <= 64):
                yield f"{key}: expected a SNOMED CT code of digits and its meaning, got {list(code)}"


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From a CT in Hounsfield units to the network's input, on a RAS grid."""

    spacing_mm: tuple[Millimetres, Millimetres, Millimetres]
    hu_window: tuple[float, float]
    """HU mapped to 0 and 1; outside is clipped, unless `clip` is off."""
    crop_foreground: bool
    """Training cases are cropped to the box of voxels above 0 after windowing."""
    binarize_labels: bool = False
    """Every label value above 0 counts as 1; only for recipes with one structure."""
    clip: bool = True
    """Off: values outside the window go on below 0 and above 1 in the same line."""
    keep_slice_spacing: bool = False
    """Along the body's axis a CT keeps its own spacing, and the third number of `spacing_mm` is not used."""

    def check(self) -> Iterator[str]:
        """Problems beyond those of single values, as "key: text"."""
        low, high = self.hu_window
        if low >= high:
            yield f"hu_window: the first value must be below the second, got [{low:g}, {high:g}]"
        if self.crop_foreground and not self.clip:
            yield "crop_foreground: needs a window that is clipped, as the box holds what is above 0; set it to false"


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """MONAI's UNet with residual units (Kerfoot et al. 2019)."""

    kind: Literal["unet"]
    channels: tuple[Channels, ...]
    strides: tuple[Count, ...]
    num_res_units: Annotated[int, Range(at_least=0)]
    norm: Literal["batch", "instance"]

    def check(self) -> Iterator[str]:
        """Problems beyond those of single values, as "key: text"."""
        if len(self.channels) < 2 or len(self.strides) != len(self.channels) - 1:
            yield f"strides: expected one less than channels ({len(self.channels)}), got {len(self.strides)}"
        if len(self.channels) > MAX_LEVELS:
            yield f"channels: at most {MAX_LEVELS} levels, got {len(self.channels)}"

    @property
    def size_multiple(self) -> int:
        """A window's size along each axis must be a multiple of this."""
        multiple = 1
        for stride in self.strides:
            multiple *= stride
        return multiple


@dataclass(frozen=True, kw_only=True)
class AHNetSpec:
    """MONAI's anisotropic hybrid network (Liu et al. 2018, arXiv:1711.08580)."""

    kind: Literal["ahnet"]
    layers: tuple[Count, Count, Count, Count]
    psp_block_num: Annotated[int, Range(at_least=0, at_most=4)]
    upsample_mode: Literal["trilinear", "transpose", "nearest"]

    @property
    def size_multiple(self) -> int:
        """A window's size along each axis must be a multiple of this: five halvings."""
        return 32


@dataclass(frozen=True, kw_only=True)
class SegResNetSpec:
    """MONAI's SegResNet (Myronenko 2018, arXiv:1810.11654)."""

    kind: Literal["segresnet"]
    init_filters: Annotated[int, Range(at_least=8, at_most=1024)]
    blocks_down: tuple[Count, ...]
    blocks_up: tuple[Count, ...]
    dropout_prob: Annotated[float, Range(at_least=0, below=1)] = 0.0

    def check(self) -> Iterator[str]:
        """Problems beyond those of single values, as "key: text"."""
        if len(self.blocks_down) < 2 or len(self.blocks_up) != len(self.blocks_down) - 1:
            yield f"blocks_up: expected one less than blocks_down ({len(self.blocks_down)}), got {len(self.blocks_up)}"
        if len(self.blocks_down) > MAX_LEVELS:
            yield f"blocks_down: at most {MAX_LEVELS} levels, got {len(self.blocks_down)}"
        if self.init_filters % 8:
            yield f"init_filters: must be a multiple of 8 (groups of the normalisation), got {self.init_filters}"

    @property
    def size_multiple(self) -> int:
        """A window's size along each axis must be a multiple of this."""
        return int(2 ** (len(self.blocks_down) - 1))


@dataclass(frozen=True, kw_only=True)
class BasicUNetSpec:
    """MONAI's BasicUNet: five levels of two convolutions each, no residuals (Falk et al. 2019)."""

    kind: Literal["basic_unet"]
    features: tuple[Channels, Channels, Channels, Channels, Channels, Channels]
    """Of the five levels, and of the last one before the scores."""
    dimensions: Literal[2, 3]
    """With 2 every slice across the z axis goes through the network by itself."""

    @property
    def size_multiple(self) -> int:
        """A window's size along each axis that the network sees must be a multiple of this: four halvings."""
        return 16


NetworkSpec = UNetSpec | AHNetSpec | SegResNetSpec | BasicUNetSpec


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Random patches for training."""

    patch_size: Size
    patches_per_case: Count
    positive_fraction: Probability
    """Share of patches centred on foreground; the others are centred on background inside the body."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to each patch. Offsets are in units of the 0..1 intensity scale."""

    shift_offset: Annotated[float, Range(at_least=0, at_most=1000)]
    shift_probability: Probability
    flip_probability: Probability = 0.0
    """For each axis by itself."""
    rotate90_probability: Probability = 0.0
    """By one, two or three quarter turns in the x-y plane; patches must be square there."""


@dataclass(frozen=True, kw_only=True)
class DiceSpec:
    """MONAI's DiceLoss on softmax scores; on the sigmoid where the network has a single score."""

    kind: Literal["dice"]
    squared_pred: bool
    batch: bool
    """The Dice sums run over all patches of a step instead of each patch alone."""
    include_background: bool


@dataclass(frozen=True, kw_only=True)
class DiceCESpec(DiceSpec):
    """MONAI's DiceCELoss: the sum of Dice on softmax scores and cross entropy, weights 1 and 1."""

    kind: Literal["dice_ce"]  # type: ignore[assignment]  # narrows the parent's literal


@dataclass(frozen=True, kw_only=True)
class NovogradSpec:
    """MONAI's Novograd with its default betas (0.9, 0.98)."""

    kind: Literal["novograd"]
    lr: Annotated[float, Range(above=0, at_most=1e30)]


@dataclass(frozen=True, kw_only=True)
class AdamSpec:
    """PyTorch's Adam with its default betas."""

    kind: Literal["adam"]
    lr: Annotated[float, Range(above=0, at_most=1e30)]


OptimizerSpec = NovogradSpec | AdamSpec


@dataclass(frozen=True, kw_only=True)
class ConstantSpec:
    """The optimizer's rate from beginning to end, after an optional warm-up."""

    kind: Literal["constant"]
    warmup_epochs: Annotated[int, Range(at_least=0)] = 0
    """Over these first epochs the rate rises from near 0 in a straight line, step by step."""


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """The rate is multiplied by `gamma` every `step_epochs` epochs."""

    kind: Literal["step"]
    step_epochs: Count
    gamma: Annotated[float, Range(above=0, at_most=1000)]
    warmup_epochs: Annotated[int, Range(at_least=0)] = 0


@dataclass(frozen=True, kw_only=True)
class CosineSpec:
    """Half a cosine from the optimizer's rate to `final_fraction` of it, step by step (arXiv:1608.03983)."""

    kind: Literal["cosine"]
    final_fraction: Probability = 0.0
    warmup_epochs: Annotated[int, Range(at_least=0)] = 0


ScheduleSpec = ConstantSpec | StepSpec | CosineSpec


@dataclass(frozen=True, kw_only=True)
class Training:
    """Length and rhythm of training."""

    epochs: Count
    batch_cases: Count
    """Cases per optimisation step, over all processes together; each gives `patches_per_case` patches."""
    validation_interval_epochs: Count
    validation_overlap: Annotated[float, Range(at_least=0, below=1)]
    amp: bool
    """Mixed precision on CUDA."""
    seed: Annotated[int, Range(at_least=0, at_most=2**31 - 1)]
    patches_per_pass: Count | None = None
    """Patches that one process sends through the network at once; a step of more accumulates gradients."""
    gradient_clip_norm: Positive | None = None
    """Gradients of a step are scaled down to this L2 norm over all weights."""
    ema_decay: Annotated[float, Range(above=0, below=1)] | None = None
    """Exponential moving average of the weights; it is what is validated and kept as the best model."""
    early_stop_epochs: Count | None = None
    """Training ends when validation Dice has not risen for so many epochs."""
    freeze: tuple[str, ...] = ()
    """Weights whose names start so are not trained; for fine-tuning."""
    deterministic: bool = False
    """Only deterministic kernels on CUDA, at a cost in speed; a CPU is always deterministic."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Sliding window of `validate` and `infer`."""

    window_size: Size
    overlap: Annotated[float, Range(at_least=0, below=1)]
    batch_windows: Count
    """Windows per network call on a GPU. On a CPU windows go one by one: more cost memory and gain nothing."""


@dataclass(frozen=True, kw_only=True)
class LesionSpec:
    """Scores of `validate` for each lesion, a 26-connected component of the label; see `lesions.py`."""

    volume_limits_ml: tuple[Positive, ...]
    """Borders of the volume classes, rising: [1, 10] makes three classes, a border belongs to the upper one."""
    min_overlap: Annotated[float, Range(above=0, at_most=1)]
    """A lesion is found when the mask covers at least this share of its voxels."""

    def check(self) -> Iterator[str]:
        """Problems beyond those of single values, as "key: text"."""
        limits = self.volume_limits_ml
        if list(limits) != sorted(set(limits)):
            yield f"volume_limits_ml: every border must be above the one before it, got {list(limits)}"


@dataclass(frozen=True, kw_only=True)
class ClicksSpec:
    """A network that segments what a person clicks on (Sakinis et al. 2019, arXiv:1903.08205); see `clicks.py`."""

    num_clicks: Annotated[int, Range(at_least=1, at_most=1000)]
    """Rounds of simulated clicks for each training step, and clicks in validation."""
    sigma_voxels: Annotated[float, Range(above=0, at_most=64)]
    """Of the Gaussian around each click."""
    margin_voxels: Annotated[int, Range(at_least=0, at_most=512)]
    """Around clicks and organs that do not fit a window together: the window then holds them and this, shrunk."""
    min_voxels: Count
    """Smaller organs, in 2D smaller sections of them, are not trained or validated on."""
    partial_fraction: Probability = 0.0
    """Share of patches that are as a first click shows them, around a voxel of the organ; the others hold all of it."""
