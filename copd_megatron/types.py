"""The nouns of the project: small records that every floor may pass around.

A prompt is shown to an expert, the expert samples a group of completions, a verifier turns each
into a reward, a teacher turns each token into a signal. Nothing here computes.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Message = dict[str, Any]
"""One chat message in Hugging Face form: {"role": "user", "content": "2+3="} or
{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many squares?"}]}."""


@dataclass(frozen=True)
class FrameSample:
    """Which frames of a video file were taken. Example: ``FrameSample((0, 12, 24), 25, 24.0)``."""

    indices: tuple[int, ...]
    total: int
    """Frames of the file."""
    fps: float
    """Frames per second of the file."""


@dataclass(frozen=True, eq=False)
class Media:
    """One decoded image or video.

    Example: ``Media("image", np.zeros((48, 48, 3), np.uint8))``; a video is [frames, H, W, 3].
    """

    kind: Literal["image", "video"]
    pixels: np.ndarray
    fps: float = 2.0
    """Frames per second of ``pixels``; only read for videos."""
    sample: FrameSample | None = None
    """Where the frames come from, for families that show the model their times; None: evenly spaced at ``fps``."""
    pixel_budget: tuple[int | None, int | None] = (None, None)
    """(least, most) pixels that it is scaled to, as the family's processor means them (Qwen3-VL: a video over all its
    frames); None: the processor's own."""


@dataclass(frozen=True, eq=False)
class TaskItem:
    """One question of a task, before tokenisation.

    Example: ``TaskItem("text/train/17", [{"role": "user", "content": "2+3="}], (), "5")``.
    """

    key: str
    """Unique and stable: the same key always names the same question."""
    messages: list[Message]
    media: tuple[Media, ...]
    """In the order of the {"type": "image"} / {"type": "video"} parts of ``messages``."""
    answer: Any
    """What the verifier compares with (the ground truth)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Free-form facts for verifiers and reports, e.g. {"level": 2, "data_source": "counting"}."""


@dataclass(frozen=True, eq=False)
class VisualInputs:
    """What the vision tower reads for one prompt, images and videos apart, each in prompt order."""

    image_patches: np.ndarray | None = None
    """[image patches, channels x temporal x patch x patch] float32."""
    image_grids: np.ndarray | None = None
    """[images, 3] int64: temporal, height, width in patches."""
    video_patches: np.ndarray | None = None
    video_grids: np.ndarray | None = None
    video_seconds: np.ndarray | None = None
    """[videos] float64: seconds from one temporal patch to the next, for families whose positions count time
    (Qwen2.5-VL); else None."""
    order: tuple[str, ...] = ()
    """Kind of each run of visual tokens in token order: ("image", "video", ...); a video contributes
    one entry, although its frames are separate runs of tokens."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenised prompt with its media: exactly what the model sees before it answers."""

    key: str
    domain: str
    """Name of the task it comes from, e.g. "image"."""
    token_ids: np.ndarray
    """[P] int64, chat template applied, generation header included, visual placeholders expanded."""
    position_ids: np.ndarray
    """[3, P] int64: temporal, height, width positions (three equal rows for plain text)."""
    next_position: int
    """Position id of the first completion token (all three rows)."""
    visual: VisualInputs | None
    visual_index: np.ndarray
    """[visual tokens] int64, where in ``token_ids`` each visual feature goes (empty for text)."""
    header_tokens: int
    """Length of the generation header (the invocation tokens) that ends ``token_ids``, e.g. 3 for
    ``<|im_start|>assistant\\n``. Scope "completion" adapts from the first of these tokens on."""
    content_hash: str
    """SHA-256 over token ids and pixels: equal prompts have equal hashes."""
    item: TaskItem | None = None


Origin = Literal["policy", "environment"]


@dataclass
class Segment:
    """A run of completion tokens with one origin; only tokens that the policy sampled carry loss.

    Example: ``Segment([17, 4, 2], "policy", [-0.1, -2.3, 0.0], [-0.1, -2.3, 0.0])``.
    """

    token_ids: list[int]
    origin: Origin = "policy"
    logprobs: list[float] = field(default_factory=list)
    """Natural log of pi at the training temperature, untruncated; empty for the environment's tokens."""
    sampled_logprobs: list[float] = field(default_factory=list)
    """Natural log under the very distribution that was sampled from (after top-p)."""


@dataclass
class Completion:
    """One sampled answer to a prompt: one segment for single-turn tasks, alternating for environments."""

    prompt: Prompt
    expert: str | None
    """The policy that sampled it; None is the backbone itself."""
    sample: int
    """Index within its group, 0 <= sample < G."""
    segments: list[Segment]
    finish: Literal["stop", "length"] = "stop"
    text: str = ""
    """Decoded policy and environment tokens, special tokens left out."""
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    """Unweighted named parts, e.g. {"accuracy": 1.0, "format": 1.0}."""
    extracted: str | None = None
    """What the verifier read as the answer, for people to look at."""

    @property
    def token_ids(self) -> list[int]:
        """All completion tokens in order, [R]."""
        return [t for s in self.segments for t in s.token_ids]

    @property
    def loss_mask(self) -> list[bool]:
        """[R]: True where the policy sampled the token."""
        return [s.origin == "policy" for s in self.segments for _ in s.token_ids]

    @property
    def logprobs(self) -> list[float]:
        """[R]: the engine's log-probs at the training temperature; 0.0 at the environment's tokens."""
        return [p for s in self.segments for p in (s.logprobs or [0.0] * len(s.token_ids))]


BACKBONE = "backbone"
"""The teacher that is no adapter: the frozen model itself."""


@dataclass(frozen=True)
class Edge:
    """Teacher -> student in one OPD step. Example: ``Edge("text", "image")``."""

    teacher: str
    """An expert, a frozen teacher's name, or ``backbone``."""
    student: str
    beta: float = 1.0
    signal: Literal["sampled", "topk", "student_topk", "full"] = "sampled"
    prompts: str | None = None
    """The expert whose prompts the student answers; None: the teacher's, or the student's own where the teacher
    is frozen."""


class UserError(Exception):
    """A mistake the user can mend: shown as one line without a traceback, exit code 2.

    The message says ``section.field: what was given; what is allowed; what to do``.
    """
