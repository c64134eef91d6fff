"""Continues images from their first patches, at any TP x PP x DP, with a key/value cache.

The model predicts the mean of the possible next patches, not a sample: its continuations are smooth. Each prediction is
the next input. A standardized patch (`normalise: patch`) has lost its mean and standard deviation; to draw it, those of
the nearest given patch are used.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron.checkpoint.load import load_weights
from megatron.common.errors import UserError
from megatron.common.log import log_on_rank_0
from megatron.data.image_pictures import picture_grid, save_picture
from megatron.data.images import ImageInfo, check_images, image, open_images
from megatron.data.patch_form import cut_patches, join_patches, patch_order
from megatron.engine.build import build_inference_engine
from megatron.engine.protocol import Engine
from megatron.generation.stages import StageLinks
from megatron.model.cache import CachedTokens, KeyValueCache, input_shape
from megatron.model.patches import EPSILON, PatchScale
from megatron.model.pipeline import PARAMETER_DTYPES
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import gather_by_rank
from megatron.parallel.process_groups import initialize
from megatron.supervision.step_timers import StepTimers
from megatron.supervision.watchdog import Watchdog

logger = logging.getLogger(__name__)


def complete_images(args: NeoXArgs) -> None:
    """Continue the images that `completion` names; rank 0 writes pictures and values. Collective."""
    args = args.model_copy(update={"sequence_parallel": False})  # a sequence of one patch cannot be sliced
    place = initialize(args)
    log_on_rank_0(place.rank)
    with Watchdog(args, place) as watchdog:
        keys, patches = args.completion, args.patches
        assert keys.path is not None  # checked with the configuration
        assert patches is not None
        check_images(keys.path, args, with_length=False)
        file, info = open_images(keys.path)
        numbers = list(range(min(keys.count, len(file))))
        images = np.stack([image(file, info, number) for number in numbers])
        total = patch_count(info, patches.size)
        given = total // 2 if keys.given_patches is None else keys.given_patches
        if not 1 <= given < total or total - 1 > args.max_position_embeddings:
            raise UserError(
                f"completion.given_patches is {given}; the images of {keys.path} have {total} patches: give 1 to "
                f"{total - 1} of them, and a max_position_embeddings of at least {total - 1}"
            )
        around = StepTimers(watchdog.whereabouts, place.device).during
        engine = build_inference_engine(args, place, around)
        load_weights(engine, args)
        completer = ImageCompleter(engine, args, around)
        own = numbers[place.dp_rank :: place.dp]
        completed: dict[int, NDArray[Any]] = {}
        try:
            for start in range(0, len(own), args.generation_batch_size):
                part = own[start : start + args.generation_batch_size]
                completed |= dict(zip(part, completer.complete(images[part], given), strict=True))
        finally:
            completer.close()
        shares: list[dict[int, NDArray[Any]]] = gather_by_rank(completed if place.model_rank == 0 else {})
        if place.rank == 0:
            whole: dict[int, NDArray[Any]] = {}
            for share in shares:
                whole |= share
            write_completions(args, info, images, np.stack([whole[number] for number in numbers]), given)


def patch_count(info: ImageInfo, size: int) -> int:
    return (info.height // size) * (info.width // size)


class ImageCompleter:
    """Continues images on an engine. Construction and `close` are collective over all ranks."""

    def __init__(self, engine: Engine, args: NeoXArgs, around: Any) -> None:
        assert args.patches is not None
        self.engine, self.args, self.place, self.keys = engine, args, engine.place, args.patches
        self.scale = PatchScale(args.patches)
        self.links = StageLinks(engine, args.distributed_timeout_minutes, around)
        self.first_layer = engine.stage_layers(self.place.pp_rank).start

    def close(self) -> None:
        self.links.close()

    @torch.inference_mode()
    def complete(self, images: NDArray[Any], given: int) -> NDArray[np.float32]:
        """Replace all patches after the first `given` by the model's; [n, height, width, bands], on all ranks."""
        keys, device = self.keys, self.place.device
        n, height, width, _ = images.shape
        cut = np.stack([cut_patches(one, keys.size, keys.order) for one in images]).astype(np.float32)
        known = torch.from_numpy(np.nan_to_num(cut[:, :given])).to(device)
        statistics = _patch_statistics(known) if keys.normalise == "patch" else None
        grid = height // keys.size, width // keys.size
        cache = KeyValueCache(n, cut.shape[1])
        inputs = known
        found = [known]
        while sum(part.shape[1] for part in found) < cut.shape[1]:
            position = sum(part.shape[1] for part in found)
            scaled = self._next(inputs, position - inputs.shape[1], cache)
            inputs = self._raw(scaled, position, grid, given, statistics)
            found.append(inputs)
        whole = torch.cat(found, dim=1).cpu().numpy()
        return np.stack([join_patches(one, height, width, keys.size, keys.order) for one in whole])

    def _next(self, inputs: Tensor, start: int, cache: KeyValueCache) -> Tensor:
        """Predict the patch that follows `inputs` [n, s, P], which begin at position `start`; scaled, [n, 1, P]."""
        n, s, values = inputs.shape
        tokens = CachedTokens(cache, 0, [start] * n, s, [(row, s - 1) for row in range(n)], self.place.device)
        if not self.place.first_stage:
            shape = input_shape(self.first_layer, self.args.num_layers, self.args.hidden_size, tokens)
            inputs = self.links.receive_hidden(shape, PARAMETER_DTYPES[self.args.precision])
        output = self.engine.forward_cached(inputs, tokens)
        if not self.place.last_stage:
            self.links.send_hidden(output)
            output = output.new_empty(n, 1, values)
        scaled = output.float().contiguous()
        if self.place.pp > 1:
            pipe = self.engine.groups.pipe
            dist.broadcast(scaled, src=dist.get_process_group_ranks(pipe)[-1], group=pipe)
        return scaled

    def _raw(
        self,
        scaled: Tensor,
        position: int,
        grid: tuple[int, int],
        given: int,
        statistics: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        if statistics is None:
            return self.scale.raw(scaled)
        nearest = nearest_given(self.keys.order, *grid, position, given)
        std, mean = (values[:, nearest : nearest + 1] for values in statistics)
        return scaled * (std + EPSILON) + mean


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(standard deviation, mean) [n, s, 1] of each patch."""
    return torch.std_mean(patches, dim=-1, keepdim=True)


def nearest_given(order: str, rows: int, columns: int, position: int, given: int) -> int:
    """Index of the one among the first `given` patches that is nearest in the image to the patch at `position`."""
    places = np.stack(np.divmod(patch_order(order, rows, columns), columns), axis=1)
    distances = np.linalg.norm(places[:given] - places[position], axis=1)
    return int(distances.argmin())


def write_completions(
    args: NeoXArgs, info: ImageInfo, images: NDArray[Any], completed: NDArray[np.float32], given: int
) -> None:
    """Write `completions.png`, with a row per image (given patches, continuation, original), and the values to
    `completions.npz`."""
    patches = args.patches
    assert patches is not None
    folder = Path(args.completion.output)
    folder.mkdir(parents=True, exist_ok=True)
    known = images.astype(np.float32).copy()
    for number, one in enumerate(known):
        cut = cut_patches(one, patches.size, patches.order)
        cut[given:] = np.nan
        known[number] = join_patches(cut, info.height, info.width, patches.size, patches.order)
    rows = [list(row) for row in zip(known, completed, images.astype(np.float32), strict=True)]
    save_picture(folder / "completions.png", picture_grid(rows))
    np.savez(folder / "completions.npz", completed=completed, given=np.array(given))
    hidden = np.isnan(known) & ~np.isnan(images.astype(np.float32))
    error = np.abs(completed - images)[hidden].mean()
    plain = np.abs(np.array(info.mean, np.float32) - images)[hidden].mean()
    total = patch_count(info, patches.size)
    print(
        f"{len(images)} images continued from {given} of {total} patches: mean absolute error "
        f"{error:.4g} in the predicted patches, {plain:.4g} for the mean of the data; pictures in {folder}"
    )
