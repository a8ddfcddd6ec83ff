"""From a task's question to the tokens, positions and patches that the model sees.

Tokenizer, chat template and processors are those of the backbone's directory, used as transformers uses them,
so that a prompt here is the prompt that the exported model meets elsewhere. Positions come from ``get_rope_index``
of the family's transformers model itself.

Shapes: P prompt tokens.
"""
from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    Qwen2_5_VLModel,
    Qwen3VLModel,
    Qwen3VLMoeModel,
)
from transformers.video_utils import VideoMetadata

from copd_megatron.model.hf_config import load_hf_config, read_json, read_spec
from copd_megatron.model.spec import Family
from copd_megatron.types import Media, Prompt, TaskItem, UserError, VisualInputs

_POSITIONS: dict[Family, type[nn.Module]] = {
    "qwen3_vl": Qwen3VLModel,
    "qwen2_5_vl": Qwen2_5_VLModel,
    "qwen3_vl_moe": Qwen3VLMoeModel,
}
"""Visual families and the transformers models that number their tokens."""


class PromptEncoder:
    """Turns questions into prompts for the backbone in one directory, and token ids back into text.

    Example: ``PromptEncoder("backbones/tiny").encode(item, domain="image")``.
    """

    def __init__(self, path: str | Path, template_args: dict[str, Any] | None = None, text_only: bool = False) -> None:
        """Load tokenizer, chat template and, for visual backbones, the processor; no weights.

        Args:
            template_args: extra variables of the chat template, e.g. {"enable_thinking": False}.
            text_only: a directory without chat template will do; then only ``encode_text`` works.

        Raises:
            UserError: a file is missing or broken, there is no chat template or stop token, or the tokenizer
                has ids that the backbone has not.
        """
        self.path, self.spec = Path(path), read_spec(path)
        self._template_args = template_args or {}
        self._processor = self._load(AutoProcessor) if self.spec.is_visual else None
        self.tokenizer = self._processor.tokenizer if self.spec.is_visual else self._load(AutoTokenizer)
        self._template = getattr(self._processor, "chat_template", None) or self.tokenizer.chat_template
        if not self._template and not text_only:
            raise UserError(f"model.path: {path} has no chat template; prompts are rendered by it; add the "
                            "chat_template.jinja of the model")
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= self.spec.vocab_size:
            raise UserError(f"model.path: {path}: the tokenizer has id {largest}, the backbone "
                            f"{self.spec.vocab_size} tokens; they must belong together; copy the tokenizer "
                            "anew")
        self.stop_token_ids: tuple[int, ...] = self._find_stop_tokens()
        self.header_token_ids: tuple[int, ...] = self._find_header() if self._template else ()
        if self.spec.is_visual:
            self._media = _MediaReader(self._processor, load_hf_config(path), self.spec.family)

    def encode(self, item: TaskItem, domain: str) -> Prompt:
        """The prompt of a question by the chat template, generation header included.

        Raises UserError naming ``item.key`` if its media do not fit its messages, the backbone cannot see, or
        a picture cannot be processed.
        """
        if not self._template:
            raise _unusable(item, f"it has messages, but {self.path} has no chat template",
                            "give a prompt, or add the model's chat_template.jinja")
        text = self._render(self._messages(item), header=True)
        prompt = self.encode_text(item, text, domain)
        header = len(self.header_token_ids)
        if header and tuple(prompt.token_ids[-header:]) != self.header_token_ids:
            raise _unusable(item, "its rendered messages do not end with the generation header",
                            "end the messages with a user turn")
        return replace(prompt, header_tokens=header)

    def encode_text(self, item: TaskItem, text: str, domain: str) -> Prompt:
        """The prompt that is ``text`` as it stands: no template, no tokens added, no header (``header_tokens`` is 0).

        The media of ``item`` replace the family's placeholders in the text, e.g. <|vision_start|><|image_pad|>
        <|vision_end|>, in their order. Raises UserError as ``encode``, and where the text has no tokens.
        """
        visual = None
        if self.spec.is_visual:
            text, visual = self._media.expand(item, text)
        elif item.media:
            raise _unusable(item, f"it has media, but family {self.spec.family} reads text only",
                            f"use a backbone that sees ({', '.join(_POSITIONS)}) or a task without media")
        token_ids = np.asarray(self.tokenize(text), np.int64)
        if not len(token_ids):
            raise _unusable(item, "its prompt has no tokens", "write at least one")
        positions, next_position, visual_index = self._positions(token_ids, visual)
        self.spec.rope.check_length(max(next_position, int(positions.max()) + 1), f"prompt {item.key!r}")
        return Prompt(
            key=item.key, domain=domain, token_ids=token_ids, position_ids=positions,
            next_position=next_position, visual=visual, visual_index=visual_index,
            header_tokens=0, content_hash=content_hash(token_ids, visual), item=item)

    @property
    def frame_rule(self) -> Literal["qwen3_vl", "qwen2_vl"]:
        """Whose arithmetic picks the frames of a video, see ``tasks.frames``: that of the directory's processor."""
        name = type(self._processor.video_processor).__name__ if self.spec.is_visual else ""
        return "qwen2_vl" if name.startswith("Qwen2") else "qwen3_vl"

    def placeholders(self, text: str) -> tuple[str, ...]:
        """"image" or "video" for each placeholder of the family in a text, in order; empty for families that read
        text only."""
        return self._media.shown(text) if self.spec.is_visual else ()

    def tokenize(self, text: str) -> list[int]:
        """Ids of rendered text, special tokens parsed and none added (for an environment's turns)."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens,
                                     clean_up_tokenization_spaces=False)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's own text, special tokens included (for coloured views); parts of a character show as
        U+FFFD."""
        return [self.decode([token], skip_special_tokens=False) for token in token_ids]

    @property
    def invocation_token_ids(self) -> tuple[int, ...]:
        """The generation header, at least one token; UserError if the chat template has none.

        Scope "completion" adapts from these tokens on, so it needs them.
        """
        if not self.header_token_ids:
            raise UserError(f"adapter.scope: completion, but the chat template in {self.path} ends prompts "
                            "with no generation header of its own; scope completion "
                            "starts there; use adapter.scope=sequence")
        return self.header_token_ids

    def _load(self, auto: type) -> Any:
        try:
            return auto.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for missing and broken files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = "processor" if auto is AutoProcessor else "tokenizer"
            raise UserError(f"model.path: {self.path}: its {what} cannot be loaded ({reason}); a backbone "
                            f"directory holds the {what} files of its model; copy them there") from error

    def _find_stop_tokens(self) -> tuple[int, ...]:
        """End-of-sequence ids of the generation config and of the tokenizer."""
        file = self.path / "generation_config.json"
        given = read_json(file).get("eos_token_id") if file.is_file() else None
        ids = {*(given if isinstance(given, list) else [given]), self.tokenizer.eos_token_id} - {None}
        if not ids:
            raise UserError(f"model.path: {self.path} names no stop token; generation_config.json or the "
                            "tokenizer must have an end-of-sequence token; add eos_token_id")
        return tuple(sorted(ids))

    def _find_header(self) -> tuple[int, ...]:
        """What the template appends to ask for an answer, as ids; empty if it has no tokens of its own."""
        probe = [{"role": "user", "content": "?"}]
        without, with_header = (self.tokenize(self._render(probe, header)) for header in (False, True))
        return tuple(with_header[len(without):]) if with_header[: len(without)] == without else ()

    def _render(self, messages: list[dict[str, Any]], header: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=header,
            **self._template_args)

    def _messages(self, item: TaskItem) -> list[dict[str, Any]]:
        """The item's messages; pure text parts are joined for families whose templates take strings only."""
        if self.spec.is_visual:
            return item.messages
        return [{**message, "content": _join_text(message["content"])} for message in item.messages]

    def _positions(self, token_ids: np.ndarray, visual: VisualInputs | None) -> tuple[np.ndarray, int, np.ndarray]:
        """Position ids [3, P], the position of a token of text that would follow, and the indices of visual
        tokens."""
        if visual is None:
            return np.tile(np.arange(len(token_ids)), (3, 1)), len(token_ids), np.zeros(0, np.int64)
        kinds = (token_ids == self.spec.image_token_id) + 2 * (token_ids == self.spec.video_token_id)
        positions = self._media.positions(np.append(token_ids, 0), np.append(kinds, 0), visual)
        return positions[:, :-1], int(positions[0, -1]), np.flatnonzero(kinds)


def content_hash(token_ids: np.ndarray, visual: VisualInputs | None) -> str:
    """SHA-256 (hex) over token ids and, with their shapes, the patches the vision tower reads and what else positions
    depend on."""
    digest = hashlib.sha256(token_ids.tobytes())
    if visual is not None:
        for array in (visual.image_grids, visual.image_patches, visual.video_grids, visual.video_patches,
                      visual.video_seconds):
            digest.update(b"none" if array is None else repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def _position_model(family: Family, config: PretrainedConfig) -> nn.Module:
    """Only the position arithmetic of the transformers model: it has a configuration and no weights."""
    model = _POSITIONS[family].__new__(_POSITIONS[family])
    nn.Module.__init__(model)
    model.config = config
    return model


@dataclass
class _Processed:
    """One kind of media after its processor."""

    patches: np.ndarray
    grids: np.ndarray
    placeholders: list[str]
    """What replaces the template's placeholder of each image or video."""
    seconds: np.ndarray | None = None
    """See ``VisualInputs.video_seconds``."""


class _MediaReader:
    """Patches, expanded placeholders and positions of images and videos.

    Calls the parts of the transformers processor one by one; its ``__call__`` does the same with ten times
    the overhead for a small picture.
    """

    def __init__(self, processor: Any, config: PretrainedConfig, family: Family) -> None:
        self.processor = processor
        self.position_model = _position_model(family, config)
        self.counts_time = hasattr(config.vision_config, "tokens_per_second")
        self.merged_patches = config.vision_config.spatial_merge_size ** 2
        tokens = {"image": processor.image_token, "video": processor.video_token}
        self.kind_of = {token: kind for kind, token in tokens.items()}
        self.placeholder = re.compile("|".join(map(re.escape, self.kind_of)))

    def shown(self, text: str) -> tuple[str, ...]:
        """Kind of each placeholder in a text."""
        return tuple(self.kind_of[token] for token in self.placeholder.findall(text))

    def expand(self, item: TaskItem, text: str) -> tuple[str, VisualInputs | None]:
        """Rendered text with one placeholder token per visual feature, and the patches; None without
        media."""
        order = tuple(media.kind for media in item.media)
        shown = self.shown(text)
        if shown != order:
            raise _unusable(item, f"its messages show {list(shown)} but its media are {list(order)}",
                            "give one medium for each image or video part, in the same order")
        if not order:
            return text, None
        images = self._images(item) if "image" in order else None
        videos = self._videos(item) if "video" in order else None
        [text], _ = self.processor.get_text_with_replacements(
            [text], images.placeholders if images else [], videos.placeholders if videos else [])
        return text, VisualInputs(
            images.patches if images else None, images.grids if images else None,
            videos.patches if videos else None, videos.grids if videos else None,
            videos.seconds if videos else None, order)

    def positions(self, token_ids: np.ndarray, kinds: np.ndarray, visual: VisualInputs) -> np.ndarray:
        """Position ids [3, P]; ``kinds`` is 1 at image tokens, 2 at video tokens, else 0."""
        about = {"image_grid_thw": visual.image_grids, "video_grid_thw": visual.video_grids,
                 "second_per_grid_ts": visual.video_seconds}
        positions, _ = self.position_model.get_rope_index(
            torch.from_numpy(token_ids)[None], torch.from_numpy(kinds)[None],
            **{name: torch.from_numpy(array) for name, array in about.items() if array is not None})
        return positions[:, 0].numpy()

    def _images(self, item: TaskItem) -> _Processed:
        pictures = [_pixels(item, media, 3) for media in item.media if media.kind == "image"]
        try:
            out = self.processor.image_processor(
                images=pictures, input_data_format="channels_first", return_tensors="pt",
                **_size(self.processor.image_processor, item, "image"))
        except ValueError as error:
            raise _unusable(item, f"an image cannot be processed ({error})", "mend or drop it") from error
        texts = [self.processor.replace_image_token(out, index) for index in range(len(pictures))]
        return _Processed(out["pixel_values"].float().numpy(), out["image_grid_thw"].long().numpy(), texts)

    def _videos(self, item: TaskItem) -> _Processed:
        videos = [media for media in item.media if media.kind == "video"]
        frames = [_pixels(item, media, 4) for media in videos]
        about = [_metadata(len(pixels), media) for pixels, media in zip(frames, videos)]
        try:
            out = self.processor.video_processor(
                videos=frames, video_metadata=about, do_sample_frames=False, return_metadata=True,
                input_data_format="channels_first", return_tensors="pt",
                **_size(self.processor.video_processor, item, "video"))
        except ValueError as error:
            raise _unusable(item, f"a video cannot be processed ({error})", "mend or drop it") from error
        texts = [self.processor.replace_video_token(out, index) for index in range(len(videos))]
        patches, grids = out["pixel_values_videos"], out["video_grid_thw"]
        seconds = None
        if self.counts_time:
            step = self.processor.video_processor.temporal_patch_size
            seconds = np.array([step / video.sampled_fps for video in out["video_metadata"]])
        return _Processed(patches.float().numpy(), grids.long().numpy(), texts, seconds)


def _metadata(frames: int, media: Media) -> VideoMetadata:
    """What the processor wants to know of a video that is decoded already."""
    if media.sample is None:
        return VideoMetadata(total_num_frames=frames, fps=media.fps, frames_indices=list(range(frames)))
    return VideoMetadata(total_num_frames=media.sample.total, fps=media.sample.fps,
                         frames_indices=list(media.sample.indices))


def _size(processor: Any, item: TaskItem, kind: str) -> dict[str, Any]:
    """The argument that gives a processor the pixel budget of an item's media, if they have one."""
    budgets = {media.pixel_budget for media in item.media if media.kind == kind}
    if len(budgets) > 1:
        raise _unusable(item, f"its {kind}s have the pixel budgets {sorted(map(str, budgets))}", "give one to all")
    least, most = budgets.pop()
    if least is most is None:
        return {}
    least = processor.size["shortest_edge"] if least is None else least
    most = processor.size["longest_edge"] if most is None else most
    if least > most:
        raise _unusable(item, f"its {kind}s shall have at least {least} and at most {most} pixels",
                        "one of them is the processor's own; give both")
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def _pixels(item: TaskItem, media: Media, dims: int) -> torch.Tensor:
    """uint8 [3, H, W] or [frames, 3, H, W] of checked pixels."""
    pixels = media.pixels
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] != 3 or not pixels.size:
        wanted = "[height, width, 3]" if dims == 3 else "[frames, height, width, 3]"
        raise _unusable(item, f"its {media.kind} is {pixels.dtype} {list(pixels.shape)}",
                        f"pixels are uint8 {wanted}")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))


def _join_text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _unusable(item: TaskItem, what: str, remedy: str) -> UserError:
    return UserError(f"tasks: question {item.key!r}: {what}; messages and media must fit each other and the "
                     f"backbone; {remedy}")
