"""Features of images: computed once for each distinct image by the frozen vision tower, and stored in the cache.

The token ids of an image follow from its pixels, the model's files and its processor, so that rows with other images
have other tokens, also in caches and checkpoints.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import hashlib
import io
import json
import math
import os
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.cache.entries import Cache
from deltaw.cache.keys import versions
from deltaw.cache.results import file_digest, load_result, store_result
from deltaw.data.image_files import unreadable_image
from deltaw.data.report import count_of
from deltaw.data.row_images import PlacedImage, RowImage, image_groups
from deltaw.decoding.request import BusyError
from deltaw.errors import UserError
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.mrope import image_grids
from deltaw.hub.processors import PROCESSOR_FILES, ModelProcessor
from deltaw.hub.skeletons import has_values
from deltaw.hub.vision import VisionTower, load_tower, loads_as_text_view
from deltaw.hub.vision_parts import is_new_connector
from deltaw.kernels.torch_private import without_dispatch
from deltaw.lora.complete_names import complete_names, set_complete_names
from deltaw.machine.choices import dtype_of
from deltaw.machine.memory import release_free_memory
from deltaw.memory.simulation import simulate
from deltaw.methods.base import INPUT_LAYER, VISION_TOWER, Method
from deltaw.platforms import rename_path
from deltaw.progress import track_progress
from deltaw.runtime.image_tokens import ImageTokens, attach_images, connector_module, verify_view
from deltaw.tensor_files import TensorFile, write_tensors
from deltaw.training.task_inputs import TaskInputs

# Maximum size of all stored features.
LIMIT_BYTES = 64 * 2**30
# A change in one of these packages invalidates stored verifications.
VERIFIED_CODE = ("torch", "transformers", "deltaw.hub", "deltaw.runtime")
# Number of features that are read at once.
_BLOCK = 1 << 14
# Token ids are int32.
_MAX_ID = 2**31 - 1
# Maximum size of encoded images that remain in memory for thumbnails.
_MAX_THUMBNAIL_BYTES = 1 << 26
# Width and height of thumbnails in pixels.
THUMBNAIL_SIDE = 96
# Files that are older than this number of seconds are not being written anymore.
_MAX_PART_AGE = 3600
# Maximum number of image sizes with cached texts.
_MAX_SIZES = 1024


@dataclass
class _StoredImage:
    """Image with its ids.

    Attributes:
        digest: Hash of the pixels, the model and its processor.
        image: The image. None once its features are stored, except for files and the first encoded images, of which
            thumbnails are created.
        first_id: Id of its first feature.
        grid: Height and width in features, or None if image tokens have ordinary text positions.
        count: Number of features.
        start: Index of its first feature in the file of all features, or None if it is not stored yet.
        prompts: Prompts that contain the image, see :meth:`RowImages.retain`.
    """

    digest: str
    image: RowImage | None
    first_id: int
    count: int
    grid: tuple[int, int] | None
    start: int | None = None
    prompts: list[weakref.ref[np.ndarray]] = field(default_factory=list)


class RowImages(TaskInputs):
    """Images of the rows of one model (:class:`deltaw.data.row_images.ImagePlacer`), and their features.

    :meth:`place`, :meth:`rows`, :meth:`contains`, :meth:`grids`, :meth:`retain` and :meth:`compute_prompt` are
    thread-safe.

    Args:
        folder: Folder of the model.
        config: Configuration of the model.
        tokenizer: Tokenizer of the model.
        dtype: Precision in which features are computed and stored.

    Attributes:
        before_connector: True if features are the inputs of the connector, which is trained.
        is_live: True if the vision tower is a part of the model and computes features in each step, so that none are
            stored.
        trains_tower, trains_connector: True if this part is trained.
        width: Size of a feature vector.
        has_new_connector: True if the model was assembled from parts, and its connector was never trained.
        limit_bytes: Maximum size of all features, or None. With a limit, features are not stored in the cache, an image
            may be used only as long as a retained prompt contains it, and its ids are not reused before 2^31 others.
    """

    limit_bytes: int | None = None

    def __init__(self, folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
        self._processor = ModelProcessor(folder, config, tokenizer)
        self.placeholder = self._processor.placeholder
        self.token_id = self._processor.token_id
        self.first_id = int(config.get_text_config(decoder=True).vocab_size)
        self.before_connector = self.is_live = self.trains_tower = self.trains_connector = False
        self.width = int(config.get_text_config(decoder=True).hidden_size)
        self._folder = folder
        self._config = config
        self._dtype = dtype_of(dtype)
        self.has_new_connector = is_new_connector(folder)
        self._identity = _identity(folder, self._processor.settings)
        self._images: dict[str, _StoredImage] = {}
        # Images in the order of their first ids.
        self._first_ids: list[int] = []
        self._sorted: list[_StoredImage] = []
        # Text, number of tokens and grid by size of the image.
        self._texts: dict[tuple[int, int], tuple[str, int, tuple[int, int] | None]] = {}
        self._cache = Cache("images", LIMIT_BYTES)
        self._table = _Table()
        self._tower: VisionTower | None = None
        self._thumbnail_bytes = 0  # images in memory with computed features
        self._next_id = self.first_id  # with a limit
        # _lock protects the images and the feature table. _computing serializes the computation of features.
        self._lock = threading.RLock()
        self._computing = threading.RLock()

    def __len__(self) -> int:
        return len(self._images)

    def place(self, image: RowImage) -> PlacedImage:
        decoded = image.decoded()
        if (known := self._texts.get(decoded.size)) is None:
            try:
                text, inputs = self._processor.encode(decoded)
            except UserError as error:
                located = UserError(error.message, location=image.location, hint=error.hint)
                raise unreadable_image(located) from error
            if len(self._texts) > _MAX_SIZES:
                self._texts.clear()
            number = int((self._processor.tokenize(text) == self.token_id).sum())
            known = self._texts[decoded.size] = text, number, next(iter(image_grids(self._config, inputs)), None)
        digest = self._digest(decoded)
        text, count, grid = known
        with self._lock:
            stored = self._images.get(digest)
            if stored is None:
                stored = self._add(digest, image, count, grid)
        return PlacedImage(text, range(stored.first_id, stored.first_id + count))

    def _digest(self, decoded: Image.Image) -> str:
        digest = hashlib.blake2b(self._identity.encode(), digest_size=16)
        digest.update(f"{decoded.size}".encode() + decoded.tobytes())
        return digest.hexdigest()

    def _add(self, digest: str, image: RowImage, count: int, grid: tuple[int, int] | None) -> _StoredImage:
        """Add an image. Its ids follow from its digest, or are the next free ones."""
        num_ids = _MAX_ID - self.first_id - count
        start = int(digest[:15], 16) if self.limit_bytes is None else self._next_id - self.first_id
        first_id = self.first_id + start % num_ids
        while (taken := self._overlapping(first_id, count)) is not None:
            first_id = taken.first_id + taken.count
            if first_id > _MAX_ID - count:
                first_id = self.first_id
        stored = _StoredImage(digest, image, first_id, count, grid)
        self._next_id = first_id + count
        self._images[digest] = stored
        position = bisect.bisect(self._first_ids, first_id)
        self._first_ids.insert(position, first_id)
        self._sorted.insert(position, stored)
        return stored

    def _overlapping(self, first_id: int, count: int) -> _StoredImage | None:
        """Return an image with ids from ``first_id`` to ``first_id + count - 1``, or None."""
        position = bisect.bisect(self._first_ids, first_id + count - 1)
        before = self._sorted[position - 1] if position else None
        return before if before is not None and before.first_id + before.count > first_id else None

    def rows(self, ids: Tensor, tower: VisionTower | None = None) -> Tensor:
        """Return the (n, width) features of token ids (n,), after computing those that are not stored.

        Args:
            tower: Compute all of them with this tower, with gradients, without storing them.

        Raises:
            UserError: if an image cannot be read anymore.
        """
        values = ids.cpu().numpy()
        if tower is not None:
            images, indices = self._find(values)
            features = [self._features(image, tower.features) for image in images]
            starts = np.cumsum([0, *map(len, features[:-1])]) - [image.first_id for image in images]
            return torch.cat(features)[torch.from_numpy(values + starts[indices])]
        self.compute(self._find(values)[0])
        with self._lock:
            images, indices = self._find(values)
            offsets = np.array([(image.start or 0) - image.first_id for image in images])
            return self._table.rows(values + offsets[indices])

    def _find(self, ids: np.ndarray) -> tuple[list[_StoredImage], np.ndarray]:
        """Return the images of token ids (n,), and (n,) indices into them."""
        with self._lock:
            positions = np.searchsorted(self._first_ids, ids, side="right") - 1
            unique, indices = np.unique(positions, return_inverse=True)
            return [self._sorted[position] for position in unique], indices

    def contains(self, ids: np.ndarray) -> np.ndarray:
        with self._lock:
            if not self._sorted:
                return np.zeros(len(ids), bool)
            positions = np.searchsorted(self._first_ids, ids, side="right") - 1
            ends = np.array([image.first_id + image.count for image in self._sorted])
        return (positions >= 0) & (ids < ends[positions])

    def grids(self, ids: np.ndarray) -> np.ndarray:
        images, indices = self._find(ids)
        table = np.array([(image.first_id, *(image.grid or (1, image.count))) for image in images]).T
        first_ids, heights, widths = table[:, indices]
        return np.stack([ids - first_ids, heights, widths])

    def retain(self, tokens: np.ndarray) -> None:
        """Keep the images of a prompt as long as the array ``tokens`` exists, and remove unused ones above the limit.

        Raises:
            BusyError: if the images of all retained prompts exceed the limit.
            UserError: if the images of this prompt exceed it.
        """
        assert self.limit_bytes is not None
        row_bytes = self.width * self._dtype.itemsize
        with self._lock:
            used = self._find(tokens[tokens >= self.first_id])[0]
            if sum(image.count for image in used) * row_bytes > self.limit_bytes:
                raise UserError("the images are too large together", hint="use fewer or smaller images")
            for image in used:
                image.prompts = [prompt for prompt in image.prompts if prompt() is not None] + [weakref.ref(tokens)]
                self._images[image.digest] = self._images.pop(image.digest)  # move to the end: most recently used
            size = sum(image.count for image in self._sorted) * row_bytes
            for image in [*self._images.values()]:
                if size > self.limit_bytes and all(prompt() is None for prompt in image.prompts):
                    size -= image.count * row_bytes
                    self._remove(image)
            if size > self.limit_bytes:
                raise BusyError("too many images are in use", hint="retry later")

    def discard_unused(self) -> None:
        """Remove images that no prompt retains and whose features were not computed, for example of rejected requests.

        No other thread may be about to retain a prompt.
        """
        with self._lock:
            for image in [*self._images.values()]:
                if image.start is None and all(prompt() is None for prompt in image.prompts):
                    self._remove(image)

    def _remove(self, image: _StoredImage) -> None:
        position = bisect.bisect_left(self._first_ids, image.first_id)
        del self._first_ids[position], self._sorted[position], self._images[image.digest]
        if self._table.count > 2 * sum(image.count for image in self._sorted):
            old = self._table
            self._table = _Table()
            for image in self._sorted:
                if image.start is not None:
                    image.start = self._table.append(old.rows(np.arange(image.start, image.start + image.count)))

    def thumbnails(self, tokens: np.ndarray) -> list[str]:
        """Return small versions of the images of a prompt as data URLs, without those that were released or removed."""
        urls = []
        images, indices = self._find(tokens[self.contains(tokens)])
        for image in (images[index].image for index in dict.fromkeys(indices.tolist())):
            with contextlib.suppress(UserError):
                if image is None:
                    continue
                picture = image.decoded().copy()
                content = io.BytesIO()
                picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                picture.save(content, "JPEG")
                urls.append(f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}")
        return urls

    def clear(self) -> None:
        """Remove all images, which no later prompt refers to."""
        with self._lock:
            self._images = {}
            self._first_ids = []
            self._sorted = []
            self._table = _Table()
            self._thumbnail_bytes = 0

    def compute_prompt(self, tokens: np.ndarray) -> None:
        """Compute the features of the images of a retained prompt (length,)."""
        self.compute(self._find(tokens[tokens >= self.first_id])[0])

    def compute(self, images: Sequence[_StoredImage] | None = None) -> None:
        """Load or compute the features of images, by default of all images.

        Raises:
            UserError: if an image cannot be read anymore, or its tokens changed.
        """
        selected = self._sorted if images is None else images
        if self.is_live or all(image.start is not None for image in selected):
            return
        with self._computing:
            missing = [image for image in selected if image.start is None and not self._load(image)]
            if not missing:
                return
            with track_progress("computing the features of images", len(missing)) as advance:
                for done, image in enumerate(missing, start=1):
                    values = self._encode(image)
                    self._save(image, values)
                    self._append(image, values)
                    advance(done)
            if self.limit_bytes is None:
                _evict(self._cache.folder)

    def _append(self, image: _StoredImage, values: Tensor) -> None:
        with self._lock:
            image.start = self._table.append(values)
            assert image.image is not None
            content = image.image.content
            if not isinstance(content, Path):
                self._thumbnail_bytes += len(content) if isinstance(content, bytes) else _MAX_THUMBNAIL_BYTES
                if self.limit_bytes is not None or self._thumbnail_bytes > _MAX_THUMBNAIL_BYTES:
                    image.image = None

    def attach(self, model: PreTrainedModel, trained: Sequence[str] = (), *, is_new: bool = False) -> None:
        """Let a text view read the images. If the model has weights, compute the features of all images.

        Args:
            trained: Names of trained modules or parameters, :data:`INPUT_LAYER` or :data:`VISION_TOWER`. A trained
                connector becomes a part of the model's embedding, and its inputs are stored. A trained vision tower
                also becomes a part, and no features are stored.
            is_new: Also train a connector that was never trained, on standardized inputs.

        Raises:
            UserError: if the model has no connector.
        """
        tower, parts = self._select_parts(trained, is_new)
        if tower is not None and has_values(model):
            tower.load(self._folder, "" if self.is_live else f"{tower.connector}.")
        if not isinstance(model.get_input_embeddings(), ImageTokens):
            if has_values(model):
                self._verify(model)
            attach_images(model, self, parts, tower if self.is_live else None)
            names = {id(m): name for name, m in model.named_modules()}
            mapping = complete_names(model)
            for name, part in parts.items():
                mapping = mapping and mapping.with_module(names[id(part)], name)
            if mapping is not None:
                set_complete_names(model, mapping)
        if has_values(model):
            self.compute()
            self.release()
            if self.before_connector and is_new and self.has_new_connector:
                layer: Any = model.get_input_embeddings()
                layer.statistics = self._table.statistics()

    def prepare(self, trained: Sequence[str], *, is_new: bool) -> None:
        """Compute the features of all images before the model is loaded, see :meth:`attach`."""
        self._select_parts(trained, is_new)
        self.compute()
        self.release()

    def continues_connector(self, trained: Sequence[str], *, is_new: bool) -> bool:
        """Return True if a connector that is trained already is trained further, see :meth:`attach`."""
        self._select_parts(trained, is_new)
        return self.trains_connector and not (is_new and self.has_new_connector)

    def _select_parts(self, trained: Sequence[str], is_new: bool) -> tuple[VisionTower | None, dict[str, nn.Module]]:
        """Set the attributes for the parts that are trained.

        Returns:
            The tower with uninitialized weights, if a part is trained, and modules for the embedding by complete name.
        """
        starts_connector = is_new and self.has_new_connector
        if not trained and not starts_connector:
            return None, {}
        tower = load_tower(self._folder, self._config, self._dtype, values=False)
        connector = tower.connector or ""
        parts = {f"{tower.prefix}{name}": part for name, part in tower.parts.items()}
        others = [f".{name}." for name in parts if not f"{connector}.".startswith(f"{name}.")]
        self.trains_tower = VISION_TOWER in trained or any(part in f".{name}" for name in trained for part in others)
        last_names = {part for name in trained for part in name.split(".")}
        last_name = connector.rpartition(".")[2]
        self.trains_connector = starts_connector or INPUT_LAYER in trained or last_name in last_names
        self.is_live = self.trains_tower or (self.trains_connector and tower.has_separators)
        if starts_connector and not self._images:
            hint = "add rows with images, or train the language model alone"
            raise UserError("a new connector cannot be trained on rows without images", location="model", hint=hint)
        if self.trains_tower and starts_connector:
            message = "the vision tower cannot be trained together with a new connector"
            hint = "train the connector first, merge the adapter, and train the tower of the merged model"
            raise UserError(message, location="lora.vision_tower", hint=hint)
        if not self.trains_connector:
            return tower, parts if self.trains_tower else {}
        module = tower.require_connector()
        if not self.is_live:
            self.before_connector = True
            self.width = int(next(module.parameters()).shape[-1])
        return tower, parts if self.trains_tower else {connector: module}

    def _verify(self, view: PreTrainedModel) -> None:
        """Check once per model and machine that the view computes the same as the complete model.

        Raises:
            UserError: if the outputs differ.
        """
        key = [self._identity, str(view.dtype)]
        if load_result("vision", key, VERIFIED_CODE) is None:
            with track_progress("comparing the text view with the complete model"):
                text, inputs = self._processor.encode(Image.new("RGB", (48, 32), (90, 140, 200)))
                tower = load_tower(self._folder, self._config, view.dtype)
                parts = tower.with_view(view)
                verify_view(
                    parts, self._processor.tokenize(f"{text}Name it."), tower.select_inputs(inputs), self.token_id
                )
            store_result("vision", key, True, VERIFIED_CODE)

    def prepare_bytes(self) -> int:
        """Return the memory for computing the features that are not stored: the tower, and its largest activations."""
        missing = [image for image in self._sorted if image.start is None and not self._path(image).is_file()]
        if not missing or self.is_live:
            return 0
        largest = max(missing, key=lambda image: image.count)
        tower = list[VisionTower]()

        def run() -> None:
            tower.append(load_tower(self._folder, self._config, self._dtype, values=False))
            self._features(largest, tower[0].features)

        try:
            return simulate(run).peak_bytes
        except Exception:  # the shapes of some families depend on values of the inputs
            return tower[0].bytes if tower else 0

    def resident_bytes(self) -> int:
        """Return the size of the features of all images, and of weights that were converted while the model was loaded.

        Their file, usually with the vision tower, remains mapped if it also contains weights that are used unconverted.
        """
        features = 0 if self.is_live else sum(i.count for i in self._sorted) * self.width * self._dtype.itemsize
        tensors = [tensor for tensor in read_checkpoint(self._folder).tensors.values() if tensor.is_float]
        converted = sum(tensor.bytes for tensor in tensors if tensor.dtype != self._dtype)
        return features + (converted if any(tensor.dtype == self._dtype for tensor in tensors) else 0)

    def describe(self, rows: Sequence[Any]) -> list[str]:
        """Return a message about the images of these rows and about which parts of the model are trained."""
        if not self._images:
            return []
        tokens = sum(image.count for image in self._sorted)
        num_rows = sum(bool((row.tokens >= self.first_id).any()) for row in rows)
        images = f"{count_of(len(self), 'distinct image')} in {num_rows:,} of {count_of(len(rows))}, {tokens:,} tokens"
        tower = "LoRA" if self.trains_tower else "frozen"
        outputs = "are computed in each step" if self.is_live else "are stored"
        connector = "trained" if self.trains_connector else "LoRA, if selected" if self.trains_tower else "frozen"
        return [f"{images}; vision tower: {tower}, its outputs {outputs}; connector: {connector}"]

    def groups(self, rows: Sequence[Any]) -> np.ndarray | None:
        """Return the group (n,) of each row: rows with the same first image."""
        return image_groups(rows, self.first_id) if self._images else None

    def extra_modules(self, model: PreTrainedModel) -> list[str]:
        """Return the name of a connector that was never trained, if it is attached."""
        connector = connector_module(model) if self.has_new_connector else None
        return [] if connector is None else [connector]

    def check_method(self, method: Method) -> None:
        if method.virtual_tokens and self._images:
            hint = "use method: lora, or input to train the connector"
            raise UserError("a soft prompt cannot be trained on rows with images", location="method", hint=hint)

    def release(self) -> None:
        """Free the vision tower. It is loaded again if further images are computed."""
        self._tower = None
        release_free_memory()

    def _open_tower(self) -> VisionTower:
        if self._tower is None:
            self._tower = load_tower(self._folder, self._config, self._dtype)
        return self._tower

    @torch.no_grad()
    def _encode(self, image: _StoredImage) -> Tensor:
        tower = self._open_tower()
        return self._features(image, tower.connector_inputs if self.before_connector else tower.features)

    def _features(self, image: _StoredImage, compute: Callable[[dict[str, Tensor]], list[Tensor]]) -> Tensor:
        """Return the (tokens, width) features of an image, which ``compute`` returns for outputs of the processor."""
        assert image.image is not None
        decoded = image.image.decoded()
        if self._digest(decoded) != image.digest:
            message = "the image changed after its row was read"
            raise UserError(message, location=image.image.location, hint="wait until the files are complete")
        with without_dispatch():  # a dry run needs the values of masks and sizes
            _, inputs = self._processor.encode(decoded)
        values = torch.cat(compute(inputs))
        if len(values) != image.count:
            message = f"the vision tower has {len(values):,} features for {image.count:,} image tokens"
            raise UserError(message, location=image.image.location, hint="check that the processor fits the model")
        return values

    # Each image is a safetensors file with a checksum. It is not flushed to the disk, because a file that is lost or
    # damaged is computed again.

    def _path(self, image: _StoredImage) -> Path:
        kind = "connector" if self.before_connector else "features"
        return self._cache.folder / f"{image.digest}-{kind}-{str(self._dtype).rpartition('.')[2]}.safetensors"

    def _load(self, image: _StoredImage) -> bool:
        """Load stored features. Return False if there are none, or the file is damaged."""
        if self.limit_bytes is not None:
            return False
        path = self._path(image)
        try:
            file = TensorFile(path)
            values = file["features"]
            expected = _checksum(values, path.name), (image.count, self.width), self._dtype
            if (file.metadata["checksum"], values.shape, values.dtype) != expected:
                raise ValueError("damaged")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        with contextlib.suppress(OSError):
            os.utime(path)
        self._append(image, values)
        return True

    def _save(self, image: _StoredImage, values: Tensor) -> None:
        if self.limit_bytes is not None:
            return
        path = self._path(image)
        with contextlib.suppress(OSError):  # without a writable cache, features are computed in each run
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.parent / f".{path.stem}.{os.getpid()}.part"
            try:
                with temporary.open("wb") as file:
                    write_tensors(file, {"features": values.contiguous()}, {"checksum": _checksum(values, path.name)})
                rename_path(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


class _Table:
    """Features of all images in an unnamed file, which is memory-mapped.

    Attributes:
        count: Number of feature vectors.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self.count = 0
        self._width = 0
        self._dtype = torch.float32
        self._values: Tensor | None = None

    def append(self, values: Tensor) -> int:
        """Append (n, width) values and return the index of the first one."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=_folder())  # noqa: SIM115 - open as long as this object
            self._width = values.shape[1]
            self._dtype = values.dtype
        try:
            self._file.seek(self.count * self._width * self._dtype.itemsize)
            self._file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
            self._file.flush()
        except OSError as error:
            hint = "free space there, or choose another cache folder in DELTAW_CACHE"
            message = f"features of images cannot be stored: {error.strerror or error}"
            raise UserError(message, location=str(_folder() or tempfile.gettempdir()), hint=hint) from error
        self._values = None
        start = self.count
        self.count += len(values)
        return start

    def rows(self, indices: np.ndarray) -> Tensor:
        """Return the values at indices (n,)."""
        if self._values is None:
            assert self._file is not None
            self._file.flush()
            row_bytes = self._width * self._dtype.itemsize
            mapped = np.memmap(self._file, np.uint8, "r", shape=(self.count, row_bytes))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the tensor is only read
                self._values = torch.from_numpy(mapped)
        return self._values[torch.from_numpy(indices)].view(self._dtype)

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Return the (width,) mean and standard deviation of all values, or None if there are none.

        The standard deviation of a nearly constant dimension is infinite, so that it is ignored. Otherwise, the folded
        weights would be too large for bf16.
        """
        total, squares = torch.zeros(2, self._width, dtype=torch.float64)
        for start in range(0, self.count, _BLOCK):
            values = self.rows(np.arange(start, min(start + _BLOCK, self.count))).double()
            total = total + values.sum(0)
            squares = squares + values.square().sum(0)
        if not self.count:
            return None
        mean = total / self.count
        std = (squares / self.count - mean.square()).clamp(min=0).sqrt()
        is_constant = (std <= 1e-3 * std.mean()) | (std <= 1e-2 * mean.abs())
        return mean.float(), std.masked_fill(is_constant, math.inf).float()


def has_images(config: PretrainedConfig, folder: Path) -> bool:
    """Return True if a causal model of this configuration is a text view and the folder has an image processor."""
    return loads_as_text_view(config, "AutoModelForCausalLM") and any(
        (folder / name).is_file() for name in PROCESSOR_FILES
    )


def _evict(folder: Path) -> None:
    """Remove files of killed processes, and the features that were not used for the longest time above the limit."""
    with contextlib.suppress(OSError):
        entries = [entry for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
        files = sorted(((entry.stat(), entry.path) for entry in entries), key=lambda file: file[0].st_mtime)
        total = sum(status.st_size for status, _ in files)
        for status, path in files:
            is_part = path.endswith(".part")
            if time.time() - status.st_mtime > _MAX_PART_AGE if is_part else total > LIMIT_BYTES:
                os.unlink(path)
                total -= status.st_size


def _folder() -> Path | None:
    """Return the cache folder for temporary files, or None if it cannot be written."""
    folder = Cache("images", LIMIT_BYTES).folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _checksum(values: Tensor, name: str) -> str:
    content = values.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(name.encode() + content.tobytes(), digest_size=16).hexdigest()


def _identity(folder: Path, settings: Mapping[str, object]) -> str:
    """Return a hash of everything that the features of an image depend on, except its pixels."""
    files = [file_digest(folder / name) for name in ("config.json", *read_checkpoint(folder).files)]
    parts = [files, settings, versions(("torch", "transformers", "pillow", "numpy", "deltaw.hub"))]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
