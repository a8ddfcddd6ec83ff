"""The frozen vision tower: transformers' own module, run once for each prompt, its features cached.

A cached feature must equal a recomputed one bit for bit, whatever other prompts share the microbatch. So a
prompt is always evaluated in the same shapes: alone, or, where small pictures would waste a CPU on call
overhead, in a batch whose size depends on nothing but the prompt's own grids and which is filled up by
repetition.

Shapes: n visual tokens, H hidden size of the backbone, L deepstack levels.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.initialization import no_init_weights
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from copd_megatron.metrics.timers import Timers
from copd_megatron.model.hf_config import load_hf_config
from copd_megatron.model.safetensor_reader import SafetensorReader
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import VISION_PREFIX
from copd_megatron.platform import on_device
from copd_megatron.types import Prompt, UserError, VisualInputs

CACHE_BYTES = 1 << 30
"""Default budget of the feature cache: 1 GiB holds some 50,000 visual tokens of a 4B backbone in bfloat16."""

BATCH_PATCHES = 512
"""Patches in one call of the tower, where batches are used: 14 pictures of 48 x 48 with patches of 8."""


def stage_needs_features(spec: BackboneSpec, layers: Sequence[int]) -> bool:
    """Whether a pipeline stage, or a chunk of it, with these (global) layers, lowest first, reads visual features: the
    first one puts them into the embeddings, the ones that hold deepstack layers add them to hidden states."""
    return spec.is_visual and layers[0] < max(1, spec.deepstack_layers)


class VisionTower:
    """Vision encoder of a backbone directory, in evaluation mode and without gradients.

    Example: ``VisionTower(path, torch.bfloat16, device).features([prompt])``.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype, device: torch.device,
                 cache_bytes: int = CACHE_BYTES, timers: Timers | None = None) -> None:
        """Load the tower's weights. UserError names the first missing, misshapen or unreadable tensor.

        Args:
            cache_bytes: features of least recently used prompts are dropped beyond this; 0 keeps none.
            timers: a run's, for phase "vision".
        """
        config = load_hf_config(path).vision_config
        with no_init_weights(), device:
            self.module = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.module.eval().requires_grad_(False)
        _load(self.module, path)
        self.dtype, self.device = dtype, device
        self.merged_patches = config.spatial_merge_size ** 2
        self.cache_bytes, self.cached_bytes = cache_bytes, 0
        self.timers = timers or Timers()
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def features(self, prompts: Sequence[Prompt]) -> tuple[Tensor, list[Tensor]] | None:
        """Merged features [n, H] of all prompts in order, and L deepstack features [n, H]; None without
        media.

        Row i belongs to the i-th visual token when the prompts' ``visual_index`` are read one after the
        other.
        """
        seeing = [prompt for prompt in prompts if prompt.visual is not None]
        if not seeing:
            return None
        found = self._look_up(seeing)
        parts = [found[prompt.content_hash] for prompt in seeing]
        stacked = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return stacked[0], list(stacked[1:])

    def _look_up(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Content hash -> [1 + L, n, H], from the cache or the tower."""
        found: dict[str, Tensor] = {}
        missing: dict[tuple, dict[str, Prompt]] = {}
        for prompt in prompts:
            key = prompt.content_hash
            if key in self._cache:
                self._cache.move_to_end(key)
                found[key] = self._cache[key]
            else:
                missing.setdefault(_shape_of(prompt.visual), {})[key] = prompt
        if missing:
            with self.timers("vision"):
                for alike in missing.values():
                    for key, features in self._compute(list(alike.values())):
                        found[key] = features
                        self._keep(key, features)
        return found

    def _keep(self, key: str, features: Tensor) -> None:
        if features.nbytes > self.cache_bytes:
            return
        self._cache[key] = features
        self.cached_bytes += features.nbytes
        while self.cached_bytes > self.cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self.cached_bytes -= dropped.nbytes

    def _compute(self, prompts: list[Prompt]) -> Iterator[tuple[str, Tensor]]:
        """(content hash, [1 + L, n, H]) of prompts whose media have equal shapes."""
        size = self._batch_size(prompts[0].visual)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            visuals = [prompt.visual for prompt in batch + [batch[0]] * (size - len(batch))]
            images = self._encode([v.image_patches for v in visuals], [v.image_grids for v in visuals])
            videos = self._encode([v.video_patches for v in visuals], [v.video_grids for v in visuals])
            for prompt in batch:
                runs = {"image": images, "video": videos}
                features = torch.cat([next(runs[kind]) for kind in prompt.visual.order], dim=1)
                if features.shape[1] != len(prompt.visual_index):
                    raise ValueError(f"{prompt.key}: {features.shape[1]} visual features for "
                                     f"{len(prompt.visual_index)} tokens")
                yield prompt.content_hash, features

    def _batch_size(self, visual: VisualInputs) -> int:
        """Prompts with these grids in one call of the tower.

        Only float32 on a CPU gains from batches and gives a row the same bits wherever it stands in one
        (measured; float64 does not).
        """
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return 1
        patches = sum(len(p) for p in (visual.image_patches, visual.video_patches) if p is not None)
        return max(1, BATCH_PATCHES // patches)

    @torch.no_grad()
    def _encode(self, patches: list[np.ndarray | None], grids: list[np.ndarray | None]) -> Iterator[Tensor]:
        """Yield [1 + L, tokens, H] for each image (or each video, whole) of each prompt, in order."""
        if patches[0] is None:
            return
        pixels = on_device(np.concatenate(patches), self.device).to(self.dtype)
        grid = torch.from_numpy(np.concatenate(grids))
        out = self.module(pixels, grid_thw=on_device(grid.numpy(), self.device), **self._layout(grid))
        stacked = torch.stack([out.pooler_output, *getattr(out, "deepstack_features", ())])
        yield from stacked.split((grid.prod(1) // self.merged_patches).tolist(), dim=1)

    def _layout(self, grid: Tensor) -> dict[str, Tensor]:
        """What the tower would make of the grids itself, made on the host: it reads sizes as numbers, three times in
        each layer where attention cuts the rows, and each time would wait for a GPU."""
        tower = self.module
        made = {"cu_seqlens": get_vision_cu_seqlens(grid),
                "position_ids": on_device(get_vision_position_ids(grid, tower.spatial_merge_size).numpy(), self.device)}
        if hasattr(tower, "window_size"):
            index, made["cu_window_seqlens"] = get_vision_window_index(
                grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
            made["window_index"] = on_device(index.numpy(), self.device)
        return made


def _shape_of(visual: VisualInputs) -> tuple:
    """Equal for prompts that the tower evaluates in equal shapes."""
    grids = (visual.image_grids, visual.video_grids)
    return visual.order, *(None if grid is None else grid.tobytes() for grid in grids)


@torch.no_grad()
def _load(module: nn.Module, path: str | Path) -> None:
    """Fill the tower in place; every tensor of it must be in the checkpoint with its shape, and none be left
    over."""
    targets = {f"{VISION_PREFIX}{name}": parameter for name, parameter in module.named_parameters()}
    with SafetensorReader(path) as reader:
        unknown = [name for name in reader.entries if name.startswith(VISION_PREFIX) and name not in targets]
        if unknown:
            raise UserError(f"model.path: {reader.entries[unknown[0]].file}: vision tensor {unknown[0]!r} is "
                            "unknown; config.json describes a tower without it; check that they belong "
                            "together")
        for name, parameter in targets.items():
            if reader.shape(name) != tuple(parameter.shape):
                raise UserError(f"model.path: {reader.entries[name].file}: tensor {name!r} has shape "
                                f"{list(reader.shape(name))}, config.json asks for {list(parameter.shape)}; "
                                "weights and config must belong together; copy both anew")
            parameter.copy_(reader.read(name))
